"""What a method looks at: a weight, a group of coupled channels, a whole network, and what data told of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from secateur.observe import Gram, MapRanks
from secateur.structure.groups import TracedAnatomy
from secateur.structure.layers import Layer, layers_of
from secateur.structure.streams import residual_streams


@dataclass(frozen=True)
class Target:
    """What a score looks at: the weight of a matrix, or of the module that reads the units of a group.

    ``weight`` is [outputs, inputs] (whatever the storage layout), float32 on the compute device; ``columns`` is
    [units, width], the input columns of each unit (empty for a matrix); a ``layer`` target has an empty weight.
    """

    name: str
    kind: str
    layer: int
    weight: Tensor
    columns: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.int64))

    @property
    def units(self) -> int:
        """Number of units that are scored."""
        return self.columns.shape[0]


@dataclass(frozen=True)
class Part:
    """The slices of one parameter that belong to the units of a coupled group.

    ``weight`` is the whole parameter, ``index`` [units, width] the positions along ``dim`` of each unit. ``role`` is
    ``weight`` (two dimensions or more), ``scale`` (the weight of a norm) or ``bias``. ``gradient`` is that of the
    loss, ``curvature`` the product of its Hessian with the gradient, ``diagonal`` an estimate of the Hessian's
    diagonal (of decoders the mean of squared gradients), all shaped like the weight, and empty for methods whose
    ``needs`` don't name them.
    """

    tensor: str
    dim: int
    index: Tensor
    role: str
    weight: Tensor
    gradient: Tensor = field(default_factory=lambda: torch.empty(0))
    curvature: Tensor = field(default_factory=lambda: torch.empty(0))
    diagonal: Tensor = field(default_factory=lambda: torch.empty(0))

    def per_unit(self, scores: Tensor) -> Tensor:
        """Scores of all entries of the parameter, as rows of the units, [units, entries of one unit]."""
        gathered = scores.movedim(self.dim, 0)[self.index.to(scores.device)]
        return gathered.flatten(1)


@dataclass(frozen=True)
class Consumer:
    """A matrix that reads channels, and what data told of its inputs.

    ``weight`` is [outputs, columns] float64; a column is a channel, in a convolution a channel at one position of the
    kernel. ``gram`` is that of the rows to which it is applied. ``columns`` are those of every unit of a group, int64,
    none where it doesn't read the unit.
    """

    name: str
    weight: Tensor
    gram: Gram
    columns: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class FeatureMaps:
    """A tensor of feature maps, and what data told of them; ``name`` is the call that computes it.

    ``channels`` are those of every unit of a group, int64, none where the unit isn't there.
    """

    name: str
    ranks: MapRanks
    channels: tuple[Tensor, ...]


@dataclass(frozen=True)
class Coupled:
    """A group of coupled channels as a criterion sees it; ``consumers`` for methods that need ``inputs``, ``maps`` for
    those that need these."""

    name: str
    units: int
    parts: tuple[Part, ...]
    consumers: tuple[Consumer, ...] = ()
    maps: tuple[FeatureMaps, ...] = ()


@dataclass(frozen=True)
class Observed:
    """What the dense network told about groups, by name, when it ran on inputs: see ``Coupled``."""

    consumers: Mapping[str, tuple[Consumer, ...]] = field(default_factory=dict)
    maps: Mapping[str, tuple[FeatureMaps, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Noise:
    """Uniform noise in [low, high) that stands in for data: ``samples`` inputs, drawn from ``seed``."""

    low: float
    high: float
    samples: int
    seed: int


@dataclass(frozen=True)
class Fitting:
    """How the weights that stay are fitted to inputs once it is known what leaves.

    ``noise`` stands in for data. With ``sequential`` a weight is fitted to what the fitted weights before it give,
    without, to the inputs of the dense network. ``norms`` says which statistics batch norms work with:

    - ``stored``: those that they have;
    - ``refit``: behind a change those of the inputs, which the network then keeps;
    - ``shift``: behind a change the stored ones moved by what the change did to those of the inputs;
    - ``own``: those of the inputs while these are looked at, after which the network has its stored ones again.
    """

    noise: Noise | None = None
    sequential: bool = True
    norms: str = "stored"


Flow = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
"""Masks of weights by name, True = kept → synaptic flow through every parameter, shaped like it, float64."""


@dataclass(frozen=True)
class Whole:
    """A whole traced network, for methods that weigh its parts against each other.

    ``parameters`` are tensors by name; ``learned`` what the data told about them (``gradient``, ``curvature``,
    ``diagonal``), by name too; ``flow`` gives the synaptic flow of the network with masked weights.
    """

    groups: tuple[Coupled, ...]
    parameters: Mapping[str, Tensor]
    learned: Mapping[str, Mapping[str, Tensor]]
    flow: Flow
    anatomy: TracedAnatomy

    @cached_property
    def layers(self) -> list[Layer]:
        """Weights, with what they cost and the groups along which they lie."""
        return layers_of(self.anatomy)

    @cached_property
    def streams(self) -> frozenset[str]:
        """Names of the groups that residual connections carry."""
        return residual_streams(self.anatomy)


Gone = frozenset[str]
"""Names of the sub-layers that leave."""


@dataclass(frozen=True)
class Sublayer:
    """The ``attention`` or the ``mlp`` (``kind``) of a block, by the name of its group, with its linear weights."""

    name: str
    kind: str
    layer: int
    params: int


class Trials(Protocol):
    """What a method that tries models without some of their sub-layers asks of the engine."""

    def losses(
        self, candidates: Sequence[Gone], *, fitness: str, tokens: int = 0, seed: int | None = None
    ) -> list[float]:
        """What the model loses without the sub-layers of every candidate, lower = better.

        ``fitness`` is ``perplexity`` or ``divergence`` (KL from the dense model in nats per token), on so many
        calibration tokens (0 = all): the first ones, or windows drawn from ``seed``.
        """
        ...

    def done(self) -> list[tuple[Gone, float]]:
        """What an earlier, interrupted run has finished, step by step."""
        ...

    def finish(self, step: int, gone: Gone, loss: float, steps: int) -> None:
        """Keep what a step, counted from 0, has chosen; there are about so many ``steps``."""
        ...


Seen = Mapping[str, Any]
"""What calibration told about the input of a target: statistic name → Statistic."""
