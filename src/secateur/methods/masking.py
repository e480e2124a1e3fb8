"""Methods that remove single weights of matrices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.allocate import MaskRule
from secateur.errors import OptionError
from secateur.healing.refit import ABOUT_TARGET, TARGETS, aimed, with_statistics
from secateur.methods.base import Refittable
from secateur.methods.views import Seen, Target
from secateur.observe import Gram, Statistic
from secateur.options import option
from secateur.search import Descent

ABOUT_REFIT = "refit: solve for the weights that stay by least squares, whatever chose them"


@dataclass(frozen=True, kw_only=True)
class WeightMethod(Refittable):
    """Zeroes single weights. Subclasses give ``score``; the engine masks by ``rule`` and keeps what ranks highest."""

    sparsity: float = option(0.5, "fraction of the weights of every matrix that is removed", ge=0, lt=1)
    pattern: str = option("", "N:M pattern, N zeros in every M consecutive inputs (2:4); overrides sparsity")
    heal: str = option("none", ABOUT_REFIT, choices=("none", "refit"))
    target: str = option("current", ABOUT_TARGET, choices=TARGETS)
    true_sequential: bool = option(False, "matrices see what those before them in the same block have become, too")

    rounds_up: ClassVar[bool] = False
    """Whether a fraction of a weight is one that leaves."""
    sweeps: ClassVar[bool] = False
    """Whether it goes through a matrix column by column."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.true_sequential and not self.in_sequence:
            raise OptionError(f"{self.name}: true_sequential needs a method that decides on what cut blocks give")
        if self.true_sequential and self.target == "dense":
            raise OptionError(f"{self.name}: true_sequential needs target=current or target=stream")

    @property
    def decides_globally(self) -> bool:
        """Whether all weights of the model compete, so that their scores are kept until the end."""
        return getattr(self, "scope", "") == "global" and not self.pattern

    @property
    def refits_later(self) -> bool:
        return self.refits and (self.decides_globally or bool(self.statistics and not self.sequential))

    @property
    def in_sequence(self) -> bool:
        return not self.decides_globally and (self.sequential or (self.refits and not self.refits_later))

    def observed_statistics(self) -> Mapping[str, type[Statistic]]:
        more: list[type[Statistic]] = [Gram] if self.refits and not self.refits_later else []
        if more or self.fits:
            more += aimed(self.target)
        return with_statistics(self.needed_statistics(), *more)

    def solve_flops(self, outputs: int, inputs: int) -> int:
        """Operations of the products by which the method itself finds new weights for one matrix; for estimates."""
        return 0

    def solve_bytes(self, outputs: int, inputs: int) -> int:
        """Bytes that this takes on top of the matrix; for estimates."""
        return 0

    def score(self, target: Target, seen: Seen) -> Tensor:
        """Score of every weight, [outputs, inputs], higher = keep."""
        raise NotImplementedError(f"{type(self).__name__} must define score() or prune()")

    def rule(self) -> MaskRule:
        """Who competes with whom, and how many stay."""
        raise NotImplementedError(f"{type(self).__name__} must define rule()")

    @property
    def ruled(self) -> bool:
        """Whether there is a ``rule``; without one the method prunes in its own way."""
        return type(self).rule is not WeightMethod.rule

    def step(self, shape: tuple[int, int]) -> int:
        """By how many weights the loss of a matrix of this shape, (outputs, inputs), grows at a time.

        An allocator gives every matrix a multiple of it, so that what it asks for is what leaves.
        """
        # a method that prunes in its own way, and rules of others, take any number of weights
        rule = self.rule() if self.ruled else None
        return rule.step(shape) if hasattr(rule, "step") else 1  # type: ignore[union-attr]

    def prune(self, target: Target, seen: Seen) -> tuple[Tensor, Tensor | None, tuple[str, ...]]:
        """(mask [outputs, inputs] bool with True = kept, new weight or None, notes for the plan)."""
        return self.rule().keep(self.score(target, seen)), None, ()


@dataclass(frozen=True, kw_only=True)
class SearchMethod(Refittable):
    """Searches masks of single weights on the whole model, which lies in memory, by its loss; no weight is changed
    unless a refit is asked for.

    ``score`` and ``rule`` give the first mask of every matrix, from the dense model, and ``descent`` says how the
    engine goes on from there. The number of weights that a matrix keeps is that of its first mask.
    """

    sparsity: float = option(0.5, "fraction of the weights of every matrix that is removed", ge=0, lt=1)
    heal: str = option("none", ABOUT_REFIT, choices=("none", "refit"))
    target: str = option("current", ABOUT_TARGET, choices=TARGETS)

    @property
    def uses_data(self) -> bool:
        return True

    @property
    def needs_gradient(self) -> bool:
        """Whether ``score`` looks at the gradient of the dense model's loss, ``seen["gradient"]``."""
        return False

    def score(self, target: Target, seen: Seen) -> Tensor:
        """Score of every weight, [outputs, inputs], higher = keep; those that rank lowest and highest stay so."""
        raise NotImplementedError(f"{type(self).__name__} must define score()")

    def rule(self) -> MaskRule:
        """Who competes with whom for the first mask, and how many stay."""
        raise NotImplementedError(f"{type(self).__name__} must define rule()")

    def descent(self) -> Descent:
        """How the masks are searched."""
        raise NotImplementedError(f"{type(self).__name__} must define descent()")
