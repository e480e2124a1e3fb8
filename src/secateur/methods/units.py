"""Methods that remove heads and FFN neurons of decoders."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from secateur.allocate import Allocator
from secateur.allocate.asked import OF_WEIGHTS, parse_budgets
from secateur.criteria.fitness import Fitness
from secateur.errors import OptionError
from secateur.healing.recovery import RecoveryOptions
from secateur.healing.recovery.adapted import Adapted
from secateur.healing.refit import ABOUT_TARGET, TARGETS, aimed, with_statistics
from secateur.methods.base import Method, Refittable
from secateur.methods.views import (
    Coupled,
    Part,
    Seen,
    Target,
)
from secateur.observe import Gram, Moments, Statistic
from secateur.options import option
from secateur.search import Episodes, Evolution
from secateur.structure import Anatomy
from secateur.timing import Workload

PARTS = {"both": ("kv_head", "head", "neuron"), "heads": ("kv_head", "head"), "mlp": ("neuron",)}
"""What may leave, by the word for it → kinds of units"""


@dataclass(frozen=True, kw_only=True)
class StructuredMethod(Method):
    """Removes whole heads and FFN neurons; what all such methods are asked for."""

    sparsity: float = option(0.2, "fraction of the budget (by default of the blocks' parameters) removed", ge=0, lt=1)
    budget: str = option("params", "what the sparsity is a fraction of", choices=OF_WEIGHTS)
    heads: str = option(
        "kv", "attention unit: a key-value head with its queries, or one query head of each", choices=("kv", "query")
    )
    min_keep: int = option(1, "units that every group keeps at least", unit="units", ge=1)
    round_to: int = option(1, "kept FFN neurons are a multiple of this", unit="neurons", ge=1)
    parts: str = option("both", "what may leave; the budget is the same", choices=tuple(PARTS))

    removes: ClassVar[tuple[str, ...]] = ("kv_head", "head", "neuron")
    """Kinds of units that the method knows to judge."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.kinds:
            raise OptionError(f"{self.name} removes FFN neurons alone, so nothing leaves with parts={self.parts}")

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of units that may leave."""
        return tuple(kind for kind in self.removes if kind in PARTS[self.parts])

    def solve_flops(self, outputs: int, inputs: int) -> int:
        """Operations of the products by which the method judges the units of one weight; for estimates."""
        return 0

    @property
    def idle(self) -> bool:
        """Whether nothing is asked to leave."""
        return self.sparsity == 0

    def share(self, anatomy: Anatomy) -> float:
        """The fraction of the linear weights of the blocks that leaves, as far as it is known; for estimates."""
        return self.sparsity


@dataclass(frozen=True, kw_only=True)
class UnitMethod(StructuredMethod, Refittable):
    """Scores the units of every group; how many leave follows from the scores and the budget."""

    budget: str = option(
        "params",
        "what the sparsity is a fraction of (params, macs, bytes, kv_bytes, latency, and neurons where nothing else"
        " leaves), or fractions of the dense model that may stay, all of them together (latency=0.7,kv_bytes=0.5)",
    )
    uniform: bool = option(False, "the best widths that are equal in every layer, so that the checkpoint stays plain")
    variants: str = option(
        "measured",
        "with uniform, kv_bytes, latency or fractions, what a group with fewer units loses: the KL divergence measured"
        " with all other groups whole, or the sum of the scores of what leaves",
        choices=("measured", "scores"),
    )
    variant_tokens: int = option(512, "calibration tokens on which variants are measured", unit="tokens", ge=1)
    workload: str = option("batch=1,prompt=256,new=32", "the request whose latency is a budget", unit="tokens")
    heal: str = option(
        "none",
        "bias: put the mean of what leaves into a bias; refit: solve for the columns that stay by least squares",
        choices=("none", "bias", "refit"),
    )
    target: str = option("current", ABOUT_TARGET, choices=TARGETS)

    asking: ClassVar[tuple[str, ...]] = (
        "sparsity", "budget", "uniform", "variants", "variant_tokens", "workload", "min_keep", "round_to",
    )  # fmt: skip
    """Options that say how much may stay, and not what is worth keeping."""

    @property
    def refits_later(self) -> bool:
        return self.refits and not self.in_sequence

    @property
    def compensates(self) -> bool:
        """Whether a bias may make up for what leaves."""
        return self.heal == "bias" or type(self).compensate is not UnitMethod.compensate

    def observed_statistics(self) -> Mapping[str, type[Statistic]]:
        more: list[type[Statistic]] = [Moments] if self.heal == "bias" else []
        if self.refits and not self.refits_later:
            more = list(self.refit_statistics().values())
        elif self.fits:
            more += aimed(self.target)
        return with_statistics(self.needed_statistics(), *more)

    def refit_statistics(self) -> Mapping[str, type[Statistic]]:
        """What is observed to refit columns, and the bias with them."""
        more = [Moments] if self.compensates else []
        return with_statistics({}, Gram, *more, *aimed(self.target))

    def revise(self, target: Target, seen: Seen, removed: Tensor) -> Tensor:
        """The units that leave, ascending int64 [removed], once their number is known; by default as allocated."""
        return removed

    def __post_init__(self) -> None:
        super().__post_init__()
        Workload.parse(self.workload)
        if "kv_bytes" in self.asked and self.heads == "query":
            raise OptionError("budget kv_bytes needs heads=kv: single query heads leave the KV cache as it is")
        if "neurons" in self.asked and set(self.kinds) != {"neuron"}:
            raise OptionError(f"{self.name}: a budget of neurons needs parts=mlp, so that nothing else leaves")

    @cached_property
    def asked(self) -> Mapping[str, float]:
        """Budget → fraction of the dense model that may stay."""
        return parse_budgets(self.budget, self.sparsity)

    @property
    def idle(self) -> bool:
        return all(fraction == 1 for fraction in self.asked.values())

    def counted(self, anatomy: Anatomy) -> int:
        """What the sparsity is a fraction of, in units of the budget: the linear weights of all blocks, or neurons."""
        if self.budget == "neurons":
            return sum(group.units for group in anatomy.of_kind(*self.kinds))
        return int(getattr(anatomy.blocks, self.budget, 1))

    def share(self, anatomy: Anatomy) -> float:
        if "neurons" in self.asked:
            weights = sum(group.units * group.cost.params for group in anatomy.of_kind(*self.kinds))
            return (1 - self.asked["neurons"]) * weights / anatomy.blocks.params
        # of other budgets nobody knows yet how many weights they take along
        return max((1 - left for name, left in self.asked.items() if name in OF_WEIGHTS), default=0.0)

    @property
    def programmed(self) -> bool:
        """Whether an integer programme decides how many units stay, in place of the method's own allocator."""
        return self.uniform or "=" in self.budget or self.budget in ("kv_bytes", "latency")

    @property
    def uses_data(self) -> bool:
        return super().uses_data or (self.programmed and self.variants == "measured")

    @property
    def in_sequence(self) -> bool:
        # how many units stay of a block depends on all others, so all are scored in the dense model
        return super().in_sequence and not self.programmed

    def options(self) -> dict[str, Any]:
        # where the budget says what stays, nothing asks for the sparsity, and nobody should read its default
        found = super().options()
        if "=" in self.budget:
            del found["sparsity"]
        return found

    def score(self, target: Target, seen: Seen) -> Tensor:
        """Score of every unit, [units], higher = keep."""
        raise NotImplementedError(f"{type(self).__name__} must define score()")

    def allocator(self) -> Allocator:
        """How the budget is spread over groups."""
        raise NotImplementedError(f"{type(self).__name__} must define allocator()")

    def compensate(self, target: Target, seen: Seen, removed: Tensor) -> Tensor | None:
        """Addition to the reader's bias, [outputs] float32, for the removed units; None = no compensation."""
        return None


@dataclass(frozen=True, kw_only=True)
class CoupledMethod(UnitMethod):
    """Scores units by all slices that leave with them, and by what the loss of calibration text tells about these.

    ``needs`` names what is wanted of the loss: its ``gradient``, that of the mean over all windows, and a ``diagonal``,
    the mean of the squared gradients of single windows. One block at a time has them. With several ``rounds`` all is
    scored again after part of it has left, each time on windows of its own.
    """

    @property
    def needs(self) -> tuple[str, ...]:
        """What these options need; nothing for scores of weights alone."""
        return ()

    @property
    def rounds(self) -> int:
        """How often everything is scored."""
        return 1

    @property
    def uses_data(self) -> bool:
        return bool(self.needs) or super().uses_data

    @property
    def kept_scores(self) -> str:
        if not self.needs or self.rounds > 1:
            return ""
        without = {*self.asking, *(() if self.draws else ("seed",))}
        own = {name: value for name, value in self.options().items() if name not in without}
        return hashlib.sha256(json.dumps([self.name, own], sort_keys=True).encode()).hexdigest()[:16]

    def partway(self, fraction: float) -> CoupledMethod:
        """The method that removes this fraction of what is asked for."""
        return dataclasses.replace(self, sparsity=self.sparsity * fraction)

    def score_coupled(self, group: Coupled) -> Tensor:
        """Score of every unit, [units], higher = keep.

        The parts of heads are their queries, keys and values and, at the end, what reads them; of neurons those that
        write them, and what reads them. The whole blocks of a model are a group without parts.
        """
        raise NotImplementedError(f"{type(self).__name__} must define score_coupled()")

    def rows(self, part: Part) -> Tensor:
        """What every channel of a slice scores, [units, channels of one]; of hidden channels one slice at a time."""
        raise NotImplementedError(f"{type(self).__name__} must define rows()")

    def together(self, rows: Sequence[Tensor]) -> Tensor:
        """Score of every unit, [units], from the rows of all slices, in the order of execution."""
        raise NotImplementedError(f"{type(self).__name__} must define together()")


@dataclass(frozen=True, kw_only=True)
class NeuronMethod(UnitMethod):
    """Removes FFN neurons and leaves attention alone; a budget of ``neurons`` counts nothing else."""

    removes: ClassVar[tuple[str, ...]] = ("neuron",)


@dataclass(frozen=True, kw_only=True)
class PolicyMethod(NeuronMethod):
    """Scores neurons by a policy that learns from weights.

    ``seen`` has the ``policy`` and the ``writer``, the weight whose rows the neurons are, [neurons, inputs] float32.
    """

    policy: str = option("", "folder of the policy: used when it is there, else learnt and written (default: nowhere)")
    matrix: str = option("gate", "the weight that the policy looks at, where FFNs have two", choices=("gate", "up"))
    seed: int = option(42, "seed of the policy and of what is drawn", ge=0)

    def options(self) -> dict[str, Any]:
        # where a policy lies on this machine says nothing about the plan
        return {name: value for name, value in super().options().items() if name != "policy"}

    def episodes_of(self) -> Episodes:
        """How the policy learns."""
        raise NotImplementedError(f"{type(self).__name__} must define episodes_of()")


@dataclass(frozen=True, kw_only=True)
class IterativeMethod(StructuredMethod, Refittable):
    """Takes heads and neurons out of the whole model, a few in every step, by what is left of it by then.

    A round looks at the model, forward and back, on calibration windows of its own, and ``refresh`` steps follow it.
    The model and its gradients lie in memory.
    """

    step_windows: int = option(8, "calibration windows of a round, drawn anew; 0: all of them", unit="windows", ge=0)
    refresh: int = option(1, "steps from one look at the model to the next", unit="steps", ge=1)
    heal: str = option(
        "none", "refit: solve for the columns that stay by least squares, at the end", choices=("none", "refit")
    )
    target: str = option("current", ABOUT_TARGET, choices=TARGETS)
    seed: int = option(0, "seed of the windows of every round", ge=0)

    @property
    def uses_data(self) -> bool:
        return True

    def cuts(self, layer: int, layers: int) -> bool:
        """Whether a block may lose something, the one with this number of so many."""
        return True

    def importance(self, before_BTD: Tensor, after_BTD: Tensor) -> float:
        """How much a block counts that makes the one of the other, float32, summed over tokens."""
        raise NotImplementedError(f"{type(self).__name__} must define importance()")

    def salience(self, weight: Tensor, gradient: Tensor) -> Tensor:
        """Score of every entry of a weight, float32 shaped like it; a unit has the sum of all that leave with it."""
        raise NotImplementedError(f"{type(self).__name__} must define salience()")

    def advance(self, sparsities: NDArray[np.float64], importance: NDArray[np.float64]) -> NDArray[np.float64]:
        """The sparsities of blocks after one more step, [blocks] in [0, 1)."""
        raise NotImplementedError(f"{type(self).__name__} must define advance()")

    @property
    def step(self) -> float:
        """What a step takes from every block where ``advance`` comes to rest before the budget is met."""
        raise NotImplementedError(f"{type(self).__name__} must define step")

    def rounds(self) -> int:
        """How often the model is looked at, roughly; for estimates."""
        raise NotImplementedError(f"{type(self).__name__} must define rounds()")


@dataclass(frozen=True, kw_only=True)
class SupernetMethod(StructuredMethod):
    """Cuts every group to several levels, and searches on the whole model how many units each group loses.

    ``levels_of`` says what a group is at each level, and ``evolution`` and ``measured_by`` how levels are put together.
    The search is made again around what it has found, with steps of half the size. Blocks are opened one at a time.
    """

    levels: int = option(5, "levels that a group is cut to: one, and as many on either side", ge=1)
    step: float = option(
        0.125, "from one level to the next, as a fraction of the units of a group, in the first search", gt=0, lt=1
    )
    iterations: int = option(2, "searches, each around what the one before has found and with half its step", ge=1)
    accumulation: str = option(
        "expectation",
        "what later blocks see: the mean of all levels weighted by what they keep, the level in the middle, or"
        " (none) the dense model",
        choices=("expectation", "centre", "none"),
    )
    seed: int = option(0, "seed of shifts and of the tokens that candidates are measured on", ge=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.levels % 2 == 0:
            raise OptionError(f"{self.name}: levels must be odd, with as many on either side, got {self.levels}")

    @property
    def in_sequence(self) -> bool:
        return self.accumulation != "none"

    def levels_of(
        self, target: Target, seen: Seen, removed: Sequence[int], balance: int
    ) -> tuple[list[tuple[Tensor, Tensor | None]], tuple[str, ...]]:
        """(what the group is when it loses each of these numbers of units, notes for the plan).

        Of every number: which units leave, bool [units], and the new weight of the reader, or None where it stays.
        Each is cut from the dense weight. With ``balance`` the units are so many equal parts, one after the other,
        which must lose the same number each.
        """
        raise NotImplementedError(f"{type(self).__name__} must define levels_of()")

    def evolution(self, tokens: int) -> Evolution:
        """How levels are searched, with so many calibration tokens. Raises DataError when they are too few."""
        raise NotImplementedError(f"{type(self).__name__} must define evolution()")

    def searches(self, tokens: int) -> int:
        """How often all groups are cut to levels, with so many calibration tokens: once where nothing is searched."""
        return self.iterations if self.evolution(tokens).generations else 1

    def measured_by(self) -> Fitness:
        """What a candidate is measured by."""
        raise NotImplementedError(f"{type(self).__name__} must define measured_by()")


@dataclass(frozen=True, kw_only=True)
class TrainedMethod(StructuredMethod):
    """Removes units while adapters are trained, which are merged into what is left.

    The windows of the calibration text are trained on. The whole model lies in memory, in float32.
    """

    steps: int = option(300, "steps of the optimiser", unit="steps", ge=1)
    batch: int = option(4, "windows of a step", unit="windows", ge=1)
    micro: int = option(0, "windows of one forward, whose gradients add up; 0: all of a step", unit="windows", ge=0)
    lr: float = option(3e-4, "learning rate at the beginning, which falls as half a cosine", gt=0)
    decay: float = option(0.0, "weight decay of AdamW", ge=0)
    clip: float = option(1.0, "largest norm of the gradients of a step; 0: any", ge=0)
    rank: int = option(8, "rank of the adapters", ge=1)
    alpha: float = option(16.0, "adapters count alpha / rank times", gt=0)
    dropout: float = option(0.05, "fraction of an adapter's inputs that is left out", ge=0, lt=1)
    targets: str = option("", "modules that get adapters, joined by +: q_proj+v_proj (default: all of the blocks)")
    checkpointing: bool = option(False, "compute activations again for the gradients instead of keeping them")
    seed: int = option(0, "seed of adapters, dropout and the order of the windows", ge=0)

    costly: ClassVar[bool] = True

    beta: float = option(0.9, "how much of the scores stays from one step to the next", ge=0, lt=1)
    normalised: bool = option(True, "let all projections of a unit weigh the same")

    @property
    def uses_data(self) -> bool:
        return True

    @property
    def needs_gradient(self) -> bool:
        """Whether ``entries`` looks at the gradients of the frozen weights."""
        return False

    def recovery(self, dtype: str) -> RecoveryOptions:
        """How the adapters are trained; forwards are in ``dtype``. Raises OptionError."""
        names = ("steps", "batch", "micro", "lr", "decay", "clip", "rank", "alpha", "dropout", "targets")
        own = {name: getattr(self, name) for name in (*names, "checkpointing", "seed")}
        return RecoveryOptions(train="lora", loss="ce", warmup=0.0, dtype=dtype, **own)

    def entries(self, adapted: Adapted) -> Tensor:
        """What every entry of a weight counts in a step, [outputs, inputs], not negative, higher = keep."""
        raise NotImplementedError(f"{type(self).__name__} must define entries()")

    def removed_at(self, step: int) -> float | None:
        """The fraction of the sparsity that has left after a step, from 1; None when nothing is decided then."""
        raise NotImplementedError(f"{type(self).__name__} must define removed_at()")

    def allocator(self, fraction: float) -> Allocator:
        """How this fraction of the sparsity is spread over groups."""
        raise NotImplementedError(f"{type(self).__name__} must define allocator()")
