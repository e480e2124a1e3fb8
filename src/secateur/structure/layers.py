"""The layers of a traced network: weights that multiply, what they cost, and along which groups they lie."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from secateur.structure.groups import TracedAnatomy
from secateur.structure.traced import Traced, Work


@dataclass(frozen=True)
class Layer:
    """One weight: its name and shape, and the multiply-accumulates of all calls on the example inputs that read it.

    ``exponents``: the fraction of a dimension that belongs to a group, summed over the dimensions, by group. When
    group g keeps the share r_g of its channels, the layer keeps about prod_g r_g^exponent of its weights.
    """

    tensor: str
    shape: tuple[int, ...]
    macs: int
    exponents: Mapping[str, float]

    @property
    def weights(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


def layers_of(anatomy: TracedAnatomy) -> list[Layer]:
    """All layers, in the order in which the network reads them. Embeddings multiply nothing and are none."""
    macs = _macs_by_weight(anatomy.trace)
    exponents: dict[str, dict[str, float]] = defaultdict(dict)
    for group in anatomy.of_kind("channel"):
        for part in group.slices:
            if part.tensor in macs:
                size = len(anatomy.trace.parameters[part.tensor].dims[part.dim])
                share = len(part.index.unique()) / size
                exponents[part.tensor][group.name] = exponents[part.tensor].get(group.name, 0.0) + share
    parameters = anatomy.trace.parameters
    return [Layer(name, parameters[name].shape, count, exponents[name]) for name, count in macs.items()]


def _macs_by_weight(trace: Traced) -> dict[str, int]:
    counted = trace.element_sizes()
    arrays = {
        frozenset(map(id, dims)): name
        for name, dims in trace.distinct_parameters().items()
        if name in counted and len(dims) > 1
    }
    found: dict[str, int] = defaultdict(int)
    for work in trace.work:
        for name in _weights_of(work, arrays):
            found[name] += work.times * math.prod(len(labels) for labels in work.factors)
    return found


def _weights_of(work: Work, arrays: Mapping[frozenset[int], str]) -> list[str]:
    """The parameters among the operands, as they are or transposed; of several those that lie along the factors."""
    operands = {frozenset(map(id, value.dims)) for value in work.operands}
    here = [dims for dims in operands if dims in arrays]
    along = set(map(id, work.factors))
    return [arrays[dims] for dims in here if len(here) == 1 or dims <= along]
