"""Feature maps: channels that lie in rows and columns where a weight reads them, before anything pools them.

A map is taken where it was computed: behind norms and activation functions, and before what only works along positions
(pooling, padding, resizing, averages, reshapes) on the way to the weight that reads it.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor, fx

from secateur.structure.readers import find_readers, is_rearranged, short_name
from secateur.structure.trace import Trace, Value

_WORDS = ("pool", "pad", "upsample")
_NAMES = ("mean", "sum", "amax", "dropout", "feature_dropout")


@dataclass
class MapPlace:
    """A tensor of feature maps, with its channels along ``dim``; ``units`` are those that weights read of it."""

    node: fx.Node
    dim: int
    units: set[int] = field(default_factory=set)

    def maps(self, x: Tensor) -> Tensor:
        """The tensor as [images, channels, rows, columns]."""
        return x.movedim(self.dim, 1) if x.dim() == 4 else x.unsqueeze(0)


def find_maps(trace: Trace) -> list[MapPlace]:
    """Where channels of a traced module are feature maps of at least two rows and columns, in the order of its calls.

    Tensors are [images, channels, rows, columns], with the channels anywhere behind the images, or a single image
    [channels, rows, columns].
    """
    found: dict[fx.Node, MapPlace] = {}
    for reader in find_readers(trace).found:
        node = _computed(reader.source)
        read = set(np.unique(trace.units.table(reader.labels)).tolist()) - {-1}
        dim = _channels(trace, trace.values.get(node), read)
        if dim is not None:
            found.setdefault(node, MapPlace(node, dim)).units.update(read)
    order = {node: number for number, node in enumerate(trace.graph.nodes)}
    return sorted(found.values(), key=lambda place: order[place.node])


def _computed(node: fx.Node) -> fx.Node:
    """The call that computes what a weight reads, back over those that only work along positions."""
    while _along_positions(node):
        node = node.all_input_nodes[0]
    return node


def _along_positions(node: fx.Node) -> bool:
    if node.op != "call_function" or len(node.all_input_nodes) != 1:
        return False
    if node.target is operator.getitem:
        # one of several results: of a pool with its indices, but also of a norm
        return _along_positions(node.all_input_nodes[0])
    name = short_name(node)
    return is_rearranged(node) or name in _NAMES or any(word in name for word in _WORDS)


def _channels(trace: Trace, value: object, read: set[int]) -> int | None:
    """The dimension along which the channels lie that are read; None where they are no maps."""
    if not isinstance(value, Value):
        return None
    units = [set(np.unique(trace.units.table(labels)).tolist()) - {-1} for labels in value.dims]
    along = [dim for dim, here in enumerate(units) if here]
    if len(along) != 1 or not read & units[along[0]]:
        return None
    (dim,) = along
    if (len(value.dims), min(dim, 1)) not in ((4, 1), (3, 0)):
        return None
    rows_and_columns = [size for d, size in enumerate(value.shape) if d not in (len(value.dims) - 4, dim)]
    return dim if min(rows_and_columns) > 1 else None
