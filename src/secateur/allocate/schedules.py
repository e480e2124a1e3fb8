"""What follows from the step of a training: how sparse the weights should be, how many are exchanged, and when.

A step is counted once the optimizer has taken it, from 1; step 0 is before the first. Schedules are functions of the
step alone: defined everywhere, and monotone between their two ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from secateur.errors import OptionError

Schedule = Callable[[int], float]
"""Step → sparsity, or fraction of the live weights that is exchanged."""


@dataclass(frozen=True)
class Updates:
    """The steps ``begin``, ``begin + every``, … up to ``end``, and ``end`` itself; ``end=None`` goes on for ever.

    Raises OptionError when they end before they begin.
    """

    begin: int
    end: int | None
    every: int

    def __post_init__(self) -> None:
        if self.end is not None and self.end < self.begin:
            raise OptionError(f"the schedule ends at step {self.end}, before it begins at step {self.begin}")

    def due(self, step: int) -> bool:
        """Whether masks change after this step."""
        if step < self.begin or (self.end is not None and step > self.end):
            return False
        return step == self.end or (step - self.begin) % self.every == 0

    def steps(self, last: int) -> Iterator[int]:
        """All of them up to ``last``."""
        return (step for step in range(self.begin, last + 1) if self.due(step))


NEVER = Updates(0, 0, 1)
"""Masks are laid before the first step and stay."""


@dataclass(frozen=True)
class Constant:
    """One value at every step."""

    value: float

    def __call__(self, step: int) -> float:
        return self.value


@dataclass(frozen=True)
class Polynomial:
    """final + (initial - final) * (1 - progress)^power, with progress from 0 at ``begin`` to 1 at ``end``.

    Power 3 is the ramp of M. Zhu and S. Gupta, arXiv:1710.01878, eq. 1; power 1 is linear.
    """

    initial: float
    final: float
    begin: int
    end: int
    power: float = 3.0

    def __call__(self, step: int) -> float:
        return self.final + (self.initial - self.final) * (1.0 - progress(step, self.begin, self.end)) ** self.power


@dataclass(frozen=True)
class Exponential:
    """Densities in a geometric row, so that every round removes the same share of what is left (LTH, SynFlow).

    1 - sparsity = (1 - initial)^(1 - progress) * (1 - final)^progress
    """

    initial: float
    final: float
    begin: int
    end: int

    def __call__(self, step: int) -> float:
        share = progress(step, self.begin, self.end)
        # exact at both ends, where powers would round
        if share in (0.0, 1.0):
            return self.final if share else self.initial
        return 1.0 - (1.0 - self.initial) ** (1.0 - share) * (1.0 - self.final) ** share


@dataclass(frozen=True)
class Cosine:
    """least + (most - least) / 2 * (1 + cos(pi * step / end)), and ``least`` after ``end`` (RigL, SNFS, GraNet)."""

    most: float
    least: float
    end: int

    def __call__(self, step: int) -> float:
        if step >= self.end:
            return self.least
        return self.least + (self.most - self.least) / 2 * (1.0 + math.cos(math.pi * max(step, 0) / self.end))


RAMPS: dict[str, Callable[[float, float, int, int, float], Schedule]] = {
    "polynomial": Polynomial,
    "exponential": lambda initial, final, begin, end, power: Exponential(initial, final, begin, end),
    "constant": lambda initial, final, begin, end, power: Polynomial(initial, final, begin - 1, begin),
}
"""How the sparsity grows from ``begin`` to ``end``; ``constant`` reaches its final value at once."""


def progress(step: int, begin: int, end: int) -> float:
    """From 0 at ``begin`` to 1 at ``end``, in [0, 1] everywhere."""
    if step >= end:
        return 1.0
    return max(step - begin, 0) / (end - begin)
