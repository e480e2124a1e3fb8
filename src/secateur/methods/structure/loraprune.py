"""LoRAPrune: remove heads and neurons while adapters are trained, scored by the adapters' own weights and gradients.

    G   = gB A + B gA - gB gA          what one step of unit rate changes B A by; gA, gB after clipping
    s   = |G * (W + a B A)|            of every entry of W, a = alpha / rank; `power=2`: squared, as in the paper
    v   = sum of s over a unit's rows of one projection (columns of o and down), divided by its norm over the units
    S  <- beta S + (1 - beta) * sum of v over the projections of the unit
    r_t = rf + (r0 - rf) (1 - (t - wT) / (T - (w + c) T))^3         r0 up to step wT, rf in the last cT steps

Every `every` steps the int(n r_t) of n units of each group with the lowest S leave for good; what has left is silent
in training, and cut at the end, when adapters are merged into the weights. No gradient of W is ever there. The first
tenth of the layers and the last one lose nothing. `metric=grad` takes the true gradient for G, `magnitude` 1, and
`random` scores at random: what the method is compared with.

The calibration windows are the text that is trained on, several times over where they are few. Published are 2 epochs
of LaMini in batches of 128 at a rate of 1e-4; the whole model is in memory, in float32.

Source: M. Zhang et al., "LoRAPrune: Structured Pruning Meets Low-Rank Parameter-Efficient Fine-Tuning", Findings of
ACL 2024, arXiv:2305.18403; official code aim-uofa/LoRAPrune. Differs from the official code: once more at rf, so that
the budget is met (`exact=false`: theirs, which stays short of it); units that have left are masked where they are read,
which gives the same function and gradients; key-value heads with their queries as units, whose shares of a fused
projection are scored apart; of `grad`, true gradients don't count in the norm that is clipped; half a cosine for the
learning rate.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.allocate import Allocator, UniformAllocator, Window, WindowAllocator
from secateur.criteria import random_scores
from secateur.errors import OptionError
from secateur.methods import Adapted, Descriptor, TrainedMethod, option, register
from secateur.structure import Anatomy


@register("loraprune")
@dataclass(frozen=True, kw_only=True)
class LoRAPrune(TrainedMethod):
    """Options of LoRAPrune; defaults from the official code, but for the length of the training."""

    metric: str = option(
        "lora", "what stands for the gradient of a weight", choices=("lora", "grad", "magnitude", "random")
    )
    power: int = option(1, "power of an entry's score: 1 as the official code, 2 as the paper", ge=1, le=2)
    initial: float = option(0.0, "r0, the sparsity at the beginning, as a fraction of the final one", ge=0, lt=1)
    warmup: float = option(0.1, "w, fraction of the steps before anything leaves", ge=0, lt=1)
    cooldown: float = option(0.1, "c, fraction of the steps in which nothing leaves any more", ge=0, lt=1)
    every: int = option(10, "steps from one pruning to the next", unit="steps", ge=1)
    exact: bool = option(True, "prune once more when the final sparsity is reached, so that the budget is met")
    ratio: float = option(0.0, "rf, share of every layer that may be cut; 0: as the sparsity says", ge=0, lt=1)
    first: float = option(0.1, "fraction of the layers, at the beginning, that lose nothing", ge=0, lt=1)
    last: int = option(1, "layers at the end that lose nothing", unit="layers", ge=0)

    descriptor: ClassVar = Descriptor(
        object="heads_and_neurons",
        granularity="structured_group",
        score="gradient",
        allocation="uniform",
        recovery="training",
        data="unlabelled_calibration",
        speedup="real",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup + self.cooldown >= 1:
            raise OptionError("loraprune: warmup and cooldown are fractions of the steps, and must leave some between")

    @property
    def idle(self) -> bool:
        return not self.ratio and super().idle

    @property
    def needs_gradient(self) -> bool:
        return self.metric == "grad"

    def entries(self, adapted: Adapted) -> Tensor:
        if self.metric == "random":
            return random_scores(adapted.name, self.seed, adapted.weight.shape).to(adapted.weight.device)
        found = (adapted.up @ adapted.down).mul_(adapted.scaling).add_(adapted.weight)
        if self.metric == "grad":
            assert adapted.gradient is not None
            found.mul_(adapted.gradient)
        elif self.metric == "lora":
            found.mul_(step_of(adapted.down, adapted.up, adapted.down_gradient, adapted.up_gradient))
        return found.abs_().pow_(self.power)

    def removed_at(self, step: int) -> float | None:
        rate, before = (cubic(t, self.steps, self.warmup, self.cooldown, self.initial) for t in (step, step - 1))
        if self.exact and rate == 1 > before:
            return 1.0
        return rate if step % self.every == 0 and self.initial < rate < 1 else None

    def share(self, anatomy: Anatomy) -> float:
        if not self.ratio:
            return super().share(anatomy)
        return self.allocator(1.0).weights(anatomy.of_kind(*self.kinds)) / anatomy.blocks.params

    def allocator(self, fraction: float) -> WindowAllocator:
        window = Window(lambda layers: int(self.first * layers), lambda layers: self.last)
        final = self.exact and fraction == 1

        def within(share: float) -> Allocator:
            return UniformAllocator(share, fill=final)

        return WindowAllocator(self.sparsity * fraction, window, window, within, self.ratio * fraction)


def step_of(down_RI: Tensor, up_OR: Tensor, down_gradient_RI: Tensor, up_gradient_OR: Tensor) -> Tensor:
    """gB A + B gA - gB gA, [outputs, inputs]: B A - (B - gB) (A - gA)."""
    return (up_gradient_OR @ (down_RI - down_gradient_RI)).addmm_(up_OR, down_gradient_RI)


def cubic(step: int, steps: int, warmup: float, cooldown: float, initial: float) -> float:
    """The sparsity at a step, as a fraction of the final one (M. Zhu and S. Gupta, arXiv:1710.01878, eq. 1)."""
    warm, end = warmup * steps, steps - cooldown * steps
    if step <= warm:
        return initial
    if step >= end:
        return 1.0
    return 1 + (initial - 1) * (1 - (step - warm) / (end - warm)) ** 3
