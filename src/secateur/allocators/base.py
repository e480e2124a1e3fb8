"""The contract between the engine and an allocator, and how a method is told what an allocator has chosen."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from secateur.allocate import UniformAllocator, mixed_patterns, parse_pattern, removed_counts, within
from secateur.errors import UsageError
from secateur.methods import Method, Seen, Target, UnitMethod, WeightMethod, check_for_decoders
from secateur.observe import Statistic
from secateur.options import check_options
from secateur.provenance import Allocation

Wishes = NDArray[np.float64]
"""sparsities, [parts] float64"""

Follower = WeightMethod | UnitMethod
"""What can follow an allocator."""


@dataclass(frozen=True)
class Part:
    """A matrix of the blocks, as an allocator sees it, or all heads and neurons of a block.

    ``role`` is ``q``, ``k``, ``v``, ``qkv``, ``o``, ``gate``, ``up``, ``gate_up`` or ``down``; empty where the model's
    family is unknown, and for a block. ``shape`` is (outputs, inputs), of a block (what its units cost, 1).
    """

    module: str
    layer: int
    role: str
    shape: tuple[int, int]

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]


def of_blocks(parts: Sequence[Part], values: Sequence[float] | Wishes) -> Wishes:
    """One value per block → one per part."""
    return np.array([float(values[part.layer]) for part in parts], dtype=np.float64)


def spread_over(values: Wishes, width: float) -> Wishes:
    """The values [parts] mapped linearly onto [0, width]; all 0 where they are equal (OWL's map)."""
    span = float(values.max() - values.min())
    return width * (values - values.min()) / span if span else np.zeros_like(values)


def sizes_of(parts: Sequence[Part]) -> Wishes:
    """The weights of every part."""
    return np.array([part.size for part in parts], dtype=np.float64)


@dataclass(frozen=True)
class BlockWeights:
    """One block of the dense model: its matrices as targets, and what was seen of the input of each.

    ``seen`` is by module; for allocators that observe whole blocks its only key is the empty string.
    """

    targets: tuple[Target, ...]
    seen: Mapping[str, Seen]


@dataclass(frozen=True, kw_only=True)
class Allocator:
    """Base class of all allocators; the fields of a subclass are its options. Raises OptionError for bad ones.

    ``observes`` says what its statistics see: the ``inputs`` of every matrix, input and output of ``blocks``, or
    ``nothing``. An allocator that looks at no block at all has ``measures`` false; one that ``tries`` whole models
    out is a ``Trying``. One that ``shares`` gives a block its sparsity whatever is in it, so that heads and neurons can
    follow it too.
    """

    name: ClassVar[str] = ""
    observes: ClassVar[str] = "nothing"
    statistics: ClassVar[Mapping[str, type[Statistic]]] = {}
    measures: ClassVar[bool] = False
    tries: ClassVar[bool] = False
    shares: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_options(self, self.name or type(self).__name__)

    @property
    def trial_tokens(self) -> int:
        """Tokens that go through whole models, where the allocator tries some."""
        return 0

    @property
    def widest_trial(self) -> int:
        """Tokens of all models that go through the blocks together, at most."""
        return 0

    def working(self) -> Allocator:
        """The allocator that does the work with these options; by default this one."""
        return self

    def options(self) -> dict[str, Any]:
        """The options as plain values, for provenance."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def needed_statistics(self, method: Any) -> Mapping[str, type[Statistic]]:
        """What must be observed when ``method`` is to prune; by default the statistics of the class."""
        return self.statistics

    def check(self, method: Any) -> None:
        """Raises UsageError, in one sentence, when ``method`` can't follow this allocator."""

    def for_pattern(self, m: int) -> Allocator:
        """The allocator to ask when N:M patterns with this M are to be mixed."""
        return self

    def measure(self, block: BlockWeights, method: Any) -> Tensor:
        """The numbers that ``sparsities`` needs of one block, float64 of any shape; stored with the run."""
        raise NotImplementedError(f"{type(self).__name__} must define measure() where it measures")

    def sparsities(self, parts: Sequence[Part], measured: Sequence[Tensor], sparsity: float) -> Wishes:
        """The sparsity of every part, [parts] float64 in [0, 1), so that ``sparsity`` of all weights leaves.

        ``measured`` are the numbers of all blocks in order, or nothing. Raises BudgetError.
        """
        raise NotImplementedError(f"{type(self).__name__} must define sparsities()")


@dataclass(frozen=True)
class Measuring:
    """An allocator at work for a method, with the words that the engine asks of whatever observes the model."""

    allocator: Allocator
    method: Follower

    sequential: ClassVar[bool] = False
    in_sequence: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return f"allocator {self.allocator.name}"

    @property
    def provenance(self) -> Allocation:
        """The allocator and its options, as a plan names them."""
        return Allocation(allocator=self.allocator.name, options=self.allocator.options())

    @property
    def statistics(self) -> Mapping[str, type[Statistic]]:
        return self.needed_statistics()

    @property
    def needs_text(self) -> bool:
        """Whether calibration text is read for the allocator, be it only to try models out."""
        return bool(self.statistics) or self.allocator.tries

    def needed_statistics(self) -> Mapping[str, type[Statistic]]:
        """See ``Method``."""
        return self.allocator.needed_statistics(self.method)

    def observed_statistics(self) -> Mapping[str, type[Statistic]]:
        """See ``Method``."""
        return self.needed_statistics()

    @property
    def uses_data(self) -> bool:
        """See ``Method``."""
        return bool(self.statistics)

    @property
    def kind(self) -> str:
        """The kind of method that takes its statistics from the same places."""
        return "LayerMethod" if self.allocator.observes == "blocks" else "WeightMethod"


def check_follows(allocator: Allocator, method: Method) -> Follower:
    """``method`` as one that follows ``allocator``. Raises UsageError, in one sentence, when it can't."""
    if isinstance(method, UnitMethod):
        return _check_units(allocator, method)
    if not isinstance(method, WeightMethod):
        check_for_decoders(method)
        does = {
            "weights": "searches at one sparsity",
            "layers": "removes whole blocks",
            "sublayers": "removes attentions and MLPs",
            "vocabulary": "removes tokens",
            "hidden_states": "rotates hidden states",
        }.get(method.descriptor.object, "finds the numbers of heads and neurons itself")
        raise UsageError(
            f"allocator {allocator.name} gives matrices their sparsity, and {method.name} {does}: take a method for"
            " weights that doesn't ('secateur methods --object weights' lists them)"
        )
    if method.decides_globally:
        raise UsageError(
            f"{method.name} with scope=global spreads the sparsity itself and can't follow allocator {allocator.name}:"
            " leave one of them out"
        )
    allocator.check(method)
    return method


def _check_units(allocator: Allocator, method: UnitMethod) -> UnitMethod:
    if not allocator.shares:
        raise UsageError(
            f"allocator {allocator.name} gives single matrices their sparsity, and {method.name} removes heads and"
            " neurons: take an allocator that gives blocks theirs ('secateur allocators' says which do)"
        )
    if method.programmed:
        raise UsageError(
            f"{method.name} with these budgets leaves the numbers of heads and neurons to an integer programme and"
            f" can't follow allocator {allocator.name}: leave one of them out"
        )
    if not isinstance(method.allocator(), UniformAllocator):
        raise UsageError(
            f"{method.name} with these options spreads the sparsity over blocks itself and can't follow allocator"
            f" {allocator.name}: leave it out, or let every block lose the same share ('secateur describe"
            f" {method.name}' lists the options)"
        )
    allocator.check(method)
    return method


def matrix_sparsities(
    allocator: Allocator,
    method: WeightMethod,
    parts: Sequence[Part],
    measured: Sequence[Tensor] = (),
    wished: Wishes | None = None,
) -> dict[str, float]:
    """The sparsity of every matrix by module: one that ``method`` can give it, so that the whole is what it asks for.

    With a pattern it is the fraction N/M of the matrix. ``wished`` are the sparsities that a search has found, instead
    of those from what was ``measured``. Raises BudgetError.
    """
    sizes = [part.size for part in parts]
    names = [part.module for part in parts]
    if not method.pattern:
        wished = allocator.sparsities(parts, measured, method.sparsity) if wished is None else wished
        steps = [method.step(part.shape) for part in parts]
        counts = removed_counts(wished, sizes, steps, method.sparsity)
        return {name: count / size for name, count, size in zip(names, counts, sizes, strict=True)}
    rule = parse_pattern(method.pattern)
    wished = allocator.for_pattern(rule.m).sparsities(parts, measured, rule.n / rule.m)
    # matrices of one block that are to lose the same keep one pattern
    groups: dict[tuple[int, float], list[int]] = {}
    for i, part in enumerate(parts):
        groups.setdefault((part.layer, round(float(wished[i]), 9)), []).append(i)
    totals = [sum(sizes[i] for i in members) for members in groups.values()]
    found = mixed_patterns([wish for _, wish in groups], totals, rule.n, rule.m)
    return {names[i]: n / rule.m for n, members in zip(found, groups.values(), strict=True) for i in members}


def with_sparsity(method: WeightMethod, part: Part, sparsity: float) -> WeightMethod:
    """``method`` as it prunes this matrix; ``sparsity`` is one that ``matrix_sparsities`` gave."""
    if not method.pattern:
        # a quarter of a weight to the side that is rounded off: no rounding of floats then loses or takes a whole one
        count = round(sparsity * part.size) + (-0.25 if method.rounds_up else 0.25)
        return dataclasses.replace(method, sparsity=max(count, 0.0) / part.size)
    m = parse_pattern(method.pattern).m
    n = round(sparsity * m)
    if n == 0:
        return dataclasses.replace(method, pattern="", sparsity=0.0)
    return dataclasses.replace(method, pattern=f"{n}:{m}")


def block_shares(
    allocator: Allocator, parts: Sequence[Part], measured: Sequence[Tensor], most: Sequence[float], sparsity: float
) -> dict[str, float]:
    """The fraction of the units that every block loses, by the name of its part; all together lose ``sparsity``.

    ``most`` is what every block can lose at most; all together can lose more than is asked for. Raises BudgetError.
    """
    sizes = sizes_of(parts)
    wished = allocator.sparsities(parts, measured, sparsity)
    found = within(wished, sizes, sparsity, most)
    return {part.module: float(share) for part, share in zip(parts, found, strict=True)}
