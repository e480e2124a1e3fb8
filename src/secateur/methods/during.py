"""The contract of methods that prune while a network is trained, which ``secateur.Sparsifier`` turns into masks.

A method says which sparsity follows from the step, when masks change, how weights are scored, and perhaps what grows
in place of what leaves. It never sees a model, an optimizer, a loop or another rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from secateur.allocate import NEVER, RAMPS, SCOPES, Constant, Cosine, Exponential, Schedule, Updates, parse_pattern
from secateur.criteria import named_generator
from secateur.errors import OptionError
from secateur.methods.base import Method
from secateur.options import option


@dataclass(frozen=True)
class Trained:
    """A weight that is being trained, as a criterion sees it, in float32 or float64.

    ``mask`` is boolean, True = live; what isn't is zero. ``gradient`` is that of the last batch, of dead weights too;
    ``momentum`` its exponential mean, ``curvature`` the product of the Hessian with it, ``flow`` the synaptic flow.
    Each is empty for methods that don't need it. ``kind`` of the layer: ``convolution``, ``linear``, or ``output`` for
    the last one, where it is told.
    """

    name: str
    weight: Tensor
    mask: Tensor
    step: int = 0
    seed: int = 0
    gradient: Tensor = field(default_factory=lambda: torch.empty(0))
    momentum: Tensor = field(default_factory=lambda: torch.empty(0))
    curvature: Tensor = field(default_factory=lambda: torch.empty(0))
    flow: Tensor = field(default_factory=lambda: torch.empty(0))
    kind: str = ""

    def uniform(self, purpose: str) -> Tensor:
        """Numbers in [0, 1) shaped like the weight, which follow from seed, step, name and purpose alone."""
        return torch.rand(self.weight.shape, generator=self._generator(purpose)).to(self.weight)

    def normal(self, purpose: str) -> Tensor:
        """The same, with mean 0 and variance 1."""
        return torch.randn(self.weight.shape, generator=self._generator(purpose)).to(self.weight)

    def _generator(self, purpose: str) -> torch.Generator:
        return named_generator(f"{self.name}@{self.step}:{purpose}", self.seed)


CRITERIA: dict[str, Callable[[Trained], Tensor]] = {
    "magnitude": lambda part: part.weight.abs(),
    "saliency": lambda part: (part.weight * part.gradient).abs(),
    "random": lambda part: part.uniform("score"),
}
"""Score of every weight, higher = keep."""

GROWTHS: dict[str, Callable[[Trained], Tensor]] = {
    "random": lambda part: part.uniform("growth"),
    "gradient": lambda part: part.gradient.abs(),
    "momentum": lambda part: part.momentum.abs(),
}
"""Score of every weight, higher = grown first."""

_LOOKS_AT = {"saliency": ("gradient",), "gradient": ("gradient",), "momentum": ("momentum",)}


def looks_at(rule: str) -> tuple[str, ...]:
    """What a criterion or growth rule of that name needs beside weights."""
    return _LOOKS_AT.get(rule, ())


@dataclass(frozen=True, kw_only=True)
class TrainingMethod(Method):
    """Masks of single weights that hold while a network is trained; by default laid once and for ever."""

    sparsity: float = option(0.9, "fraction of the weights that is removed in the end", ge=0, lt=1)
    floor: float = option(0.0, "fraction of the weights of every layer that stays whatever the others have", ge=0, lt=1)
    keep_first: bool = option(False, "the first layer stays dense")
    depthwise: bool = option(False, "prune depthwise convolutions too")
    seed: int = option(0, "seed of random masks, growth and ties", ge=0)

    instead: ClassVar[str] = (
        "prunes while a network is trained or before, and nothing is trained here: put"
        " secateur.Sparsifier(model, optimizer, method='{name}') into your training loop, or take a method that prunes"
        " a trained model ('secateur methods' shows them all)"
    )
    skips: ClassVar[bool] = False
    """Whether the optimizer's step is taken back where masks change."""

    def needed(self) -> tuple[str, ...]:
        """What it looks at beside weights: ``gradient`` (where masks change), ``momentum`` (at every step)."""
        return ()

    def smoothing(self) -> float:
        """How much of the mean gradient stays at every step."""
        return 0.9

    def schedule(self) -> Schedule:
        """Step → sparsity."""
        return Constant(self.sparsity)

    def updates(self) -> Updates:
        """The steps after which masks change."""
        return NEVER

    def competition(self) -> str:
        """Who competes when the sparsity grows, see ``allocate.SCOPES``."""
        return "uniform"

    def random_start(self) -> str:
        """``erk`` or ``uniform`` for a random mask before the first step; empty to begin with all weights."""
        return ""

    def rate(self, step: int) -> float:
        """Fraction of the live weights of every layer that is exchanged for others after this step."""
        return 0.0

    def exchanged(self, live: int, rate: float) -> int:
        """How many of so many live weights that is."""
        return int(live * rate)

    def exchanged_counts(self, parts: Mapping[str, Trained], rate: float) -> Mapping[str, int]:
        """The same of all layers."""
        return {name: self.exchanged(int(part.mask.sum()), rate) for name, part in parts.items()}

    def score(self, part: Trained) -> Tensor:
        """Score of every weight, shaped like it, higher = keep."""
        return CRITERIA["magnitude"](part)

    def growing(self, part: Trained) -> Tensor:
        """Score of every weight, shaped like it, higher = grown first."""
        raise NotImplementedError(f"{type(self).__name__} must define growing() where it has a rate()")

    def shares(self, parts: Mapping[str, Trained]) -> Mapping[str, float] | None:
        """How what leaves is shared out among layers, relative numbers; None gives each layer back what it lost.

        Masks are those before anything leaves.
        """
        return None

    def blocks(self) -> Blocks | None:
        """Weights that leave together; None for each by itself."""
        return None

    def run_length(self) -> int:
        """M of an N:M pattern along the inputs, N following the schedule; 0 for none."""
        return 0


@dataclass(frozen=True)
class Blocks:
    """Blocks of so many rows and columns of a matrix, scored by the ``avg`` or ``max`` of their entries."""

    rows: int
    columns: int
    pooling: str


@dataclass(frozen=True, kw_only=True)
class StartingMethod(TrainingMethod):
    """Finds one mask before training, from batches or from the network alone, in one or more rounds."""

    rounds: int = option(1, "rounds of scoring and removing", unit="rounds", ge=1)

    needs: ClassVar[tuple[str, ...]] = ()
    """``gradient``, ``curvature`` (of the loss of batches), or ``flow``."""

    def sparsities(self) -> tuple[float, ...]:
        """What has left after every round, in equal shares of what is left; scores are taken anew before each."""
        return tuple(map(Exponential(0.0, self.sparsity, 0, self.rounds), range(1, self.rounds + 1)))

    def needed(self) -> tuple[str, ...]:
        return self.needs

    def competition(self) -> str:
        return "global"

    def loss(self) -> Callable[[nn.Module, Any], Tensor] | None:
        """The loss of a classifier where it isn't plain cross-entropy."""
        return None

    def score(self, part: Trained) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define score()")


@dataclass(frozen=True, kw_only=True)
class ScheduledMethod(TrainingMethod):
    """Masks that change at some steps of the training."""

    begin: int = option(0, "step of the first update", unit="steps", ge=0)
    end: int = option(0, "step of the last update; 0 for the share of steps that the method says", unit="steps", ge=0)
    every: int = option(100, "from one update to the next", unit="steps", ge=1)
    steps: int = option(0, "length of the training, where end isn't given or the method needs it", unit="steps", ge=0)

    ends: ClassVar[float] = 0.75
    """The share of ``steps`` at which the last update is."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.end and self.steps and self.end > self.steps:
            raise OptionError(f"{self.name}: end is step {self.end}, but the training has {self.steps} steps")
        # whether there is a last step at all is asked when there is a network to train
        if not (self.end or self.steps):
            return
        if self.last <= self.begin:
            raise OptionError(
                f"{self.name}: the schedule ends at step {self.last}, before it begins at step {self.begin}"
            )
        if self.every > self.last - self.begin:
            window = self.last - self.begin
            raise OptionError(f"{self.name}: every is {self.every} steps, but from begin to end there are {window}")

    @property
    def last(self) -> int:
        """The step of the last update. Raises OptionError where nothing says it."""
        if not (self.end or self.steps):
            raise OptionError(f"{self.name} needs end (step of the last update) or steps (length of the training)")
        return self.end or int(self.steps * self.ends)

    def updates(self) -> Updates:
        return Updates(self.begin, self.last, self.every)


@dataclass(frozen=True, kw_only=True)
class GradualMethod(ScheduledMethod):
    """The sparsity grows from ``initial`` to ``sparsity``."""

    initial: float = option(0.0, "sparsity before the first update", ge=0, lt=1)
    ramp: str = option("polynomial", "how the sparsity grows from begin to end", choices=tuple(RAMPS))
    power: float = option(3.0, "exponent of the polynomial; 1 is linear", gt=0)
    scope: str = option("uniform", "every layer loses the same fraction, all compete, or by ERK", choices=SCOPES)
    criterion: str = option("magnitude", "score of a weight", choices=tuple(CRITERIA))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.initial > self.sparsity:
            raise OptionError(
                f"{self.name}: the sparsity can't go down, from initial {self.initial:g} to {self.sparsity:g}"
            )

    def needed(self) -> tuple[str, ...]:
        return looks_at(self.criterion)

    def schedule(self) -> Schedule:
        return RAMPS[self.ramp](self.initial, self.sparsity, self.begin, self.last, self.power)

    def competition(self) -> str:
        return self.scope

    def random_start(self) -> str:
        return "erk" if self.initial else ""

    def score(self, part: Trained) -> Tensor:
        return CRITERIA[self.criterion](part)


@dataclass(frozen=True, kw_only=True)
class DynamicMethod(ScheduledMethod):
    """A fixed number of live weights; some are exchanged for others every now and then."""

    distribution: str = option("erk", "densities of layers of the random mask at the start", choices=("erk", "uniform"))
    fraction: float = option(0.3, "of the live weights that is exchanged at the first update", gt=0, lt=1)
    decay: str = option("cosine", "how that falls until end", choices=("cosine", "constant"))
    growth: str = option("gradient", "what grows first among dead weights", choices=tuple(GROWTHS))

    least: ClassVar[float] = 0.0
    """What a fraction that falls ends at."""

    def needed(self) -> tuple[str, ...]:
        return looks_at(self.growth)

    def random_start(self) -> str:
        return self.distribution

    def rate(self, step: int) -> float:
        falling = (
            Cosine(self.fraction, min(self.least, self.fraction), self.last)
            if self.decay == "cosine"
            else Constant(self.fraction)
        )
        return falling(step)

    def growing(self, part: Trained) -> Tensor:
        return GROWTHS[self.growth](part)


def parse_blocks(block: str, pooling: str) -> Blocks | None:
    """``1x4`` → Blocks(1, 4); an empty string is None. Raises OptionError."""
    if not block:
        return None
    rows, cross, columns = block.partition("x")
    if not (cross and rows.isdecimal() and columns.isdecimal() and int(rows) and int(columns)):
        raise OptionError(f"block must be ROWSxCOLUMNS such as 1x4, got '{block}'")
    return Blocks(int(rows), int(columns), pooling)


def parse_zeros(pattern: str) -> tuple[float, int]:
    """``2:4`` → (0.5, 4), the sparsity and M. Raises OptionError."""
    parsed = parse_pattern(pattern)
    return parsed.share, parsed.m
