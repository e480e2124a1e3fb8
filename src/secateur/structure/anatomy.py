"""What can be cut in a model: groups of coupled slices, sparsifiable matrices, and what is frozen and why.

Law: removing unit ``u`` of a group means removing ``slices.index[u]`` from every tensor of ``group.slices``,
all together or not at all; the units of one group are disjoint, and so are the groups of one layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from secateur.provenance import Coverage, LeftAlone

HIDDEN = "hidden"
"""The group of the hidden channels of a decoder, and its kind."""


@dataclass(frozen=True)
class Cost:
    """What something costs: parameters, multiply-accumulates per token, bytes of weights, KV-cache bytes per token."""

    params: int = 0
    macs: int = 0
    bytes: int = 0
    kv_bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, f) + getattr(other, f) for f in self.__dataclass_fields__))

    def __mul__(self, times: int) -> Cost:
        return Cost(*(getattr(self, f) * times for f in self.__dataclass_fields__))


@dataclass(frozen=True)
class Slices:
    """The part of one tensor that belongs to the units of a group.

    ``index`` is [units, width] int64: positions along ``dim`` of the stored tensor that leave with each unit.
    """

    tensor: str
    dim: int
    index: Tensor


@dataclass(frozen=True)
class Group:
    """``units`` coupled units that can leave the model one by one.

    ``kind`` is ``neuron``, ``kv_head`` (a key-value head with its query heads), ``head`` (single query heads, one
    out of each key-value group together), ``layer``, ``vocab`` (tokens) or ``hidden`` (entries of the residual
    stream). ``reader`` names the linear module whose input columns are the units (o_proj, down_proj); only heads and
    neurons have one. ``cost`` is the cost of one unit. ``balance`` is the number of equal consecutive parts of the
    units that must lose the same number each (query heads of key-value groups); ``parts`` the query heads of one unit.
    Unless a multiple of ``multiple`` stays, stock classes may refuse the checkpoint. ``frozen`` says why units must not
    be cut one by one; ``inexact`` why a masked model differs from a cut one.
    """

    name: str
    kind: str
    layer: int
    units: int
    cost: Cost
    slices: tuple[Slices, ...] = ()
    reader: str | None = None
    balance: int = 1
    parts: int = 1
    multiple: int = 1
    frozen: str | None = None
    inexact: str | None = None

    @cached_property
    def columns(self) -> Tensor:
        """Input columns of the reader that belong to each unit, [units, width] int64."""
        for part in self.slices:
            if part.tensor == f"{self.reader}.weight":
                return part.index
        raise LookupError(f"{self.name} has no reader")

    @cached_property
    def pieces(self) -> tuple[Slices, ...]:
        """The slices by projection, in their order: those of a fused tensor come apart, queries, keys and values."""
        return tuple(
            Slices(part.tensor, part.dim, index)
            for part in self.slices
            for index in part.index.split(self._widths(part.index.shape[1]), dim=1)
        )

    def _widths(self, width: int) -> list[int]:
        """How many of the positions of a unit belong to each of the projections that one tensor holds."""
        if self.kind == "neuron":
            return [1] * width
        if self.kind == "kv_head":
            queries = self.columns.shape[1]
            head = queries // self.parts
            if width == queries + 2 * head:
                return [queries, head, head]
        return [width]


@dataclass(frozen=True)
class Matrix:
    """A weight whose single entries can be zeroed: ``shape`` is (outputs, inputs).

    ``transposed`` marks weights that are stored [inputs, outputs] (GPT-2's Conv1D).
    """

    module: str
    layer: int
    shape: tuple[int, int]
    transposed: bool = False

    @property
    def tensor(self) -> str:
        return f"{self.module}.weight"


@dataclass(frozen=True)
class Frozen:
    """Something that is left alone, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Anatomy:
    """Everything that can be cut in one model. ``blocks`` is the cost of the matrices of all decoder blocks together.

    ``left_alone`` are the other weights of the blocks, with two dimensions or more, which lie in no matrix.
    """

    model_type: str
    num_layers: int
    groups: tuple[Group, ...]
    matrices: tuple[Matrix, ...]
    frozen: tuple[Frozen, ...]
    blocks: Cost
    total: Cost
    left_alone: tuple[LeftAlone, ...] = field(default=(), kw_only=True)
    _by_name: dict[str, Group] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_name", {g.name: g for g in self.groups})

    def __getitem__(self, name: str) -> Group:
        return self._by_name[name]

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    @property
    def coverage(self) -> Coverage | None:
        """What a method for matrices reaches of the blocks; None where nothing is left alone."""
        if not self.left_alone:
            return None
        rest = sum(item.params for item in self.left_alone)
        return Coverage(weights=self.blocks.params + rest, reached=self.blocks.params, left_alone=self.left_alone)

    def of_kind(self, *kinds: str) -> list[Group]:
        """The groups of these kinds that may be cut, in model order."""
        return [g for g in self.groups if g.kind in kinds and g.frozen is None]

    def __str__(self) -> str:
        from secateur.report.tables import anatomy_text

        return anatomy_text(self)
