"""Adapt-Pruner: remove a little at a time, each time most from blocks whose output points where their input does.

    I_l      = - mean over tokens of cos(h_l, h_{l+1})       h_l enters block l, h_{l+1} leaves it
    I_l     <- (I_l - mean I) / max |I_l - mean I|           over blocks: mean 0, largest size 1
    s_l(t+1) = clip( s_l(t) + 1 / steps - amplitude * I_l, 0, 0.99 ),   s_l(0) = 0
    removed  = C_now - int( C_0 (1 - s_l(t+1)) )             channels of C_0; a head when all of its own are due
    lowest   sum of |w g| over all weights that leave with a unit, g the gradient of the loss   (first-order Taylor)

Before every step importances and gradients are taken anew from what is left, on windows of its own, until the budget
is met; in the last step those leave that are due first. With amplitude 0 every block loses the same.

With `--stages` pruning and training alternate (Adapt-Accel); published are stages that take 5 % of the parameters each:

    secateur prune MODEL --method adapt_pruner --stages 6 --heal full:steps=300,loss=ce,schedule=wsd

Source: "Adapt-Pruner: Adaptive Structural Pruning for Efficient Small Language Model Training", 2025, arXiv:2502.03460;
official code research4pan/AdaptPruner, whose shipped runs have these defaults, but 512 windows of 64 tokens for every
step, where 8 are the default here (`step_windows`). Differs from the official code: equal importances are 0 (theirs:
0/0); `euclidean` and `manhattan` distances count for a block (theirs: against it, `official_sign`); key-value heads
collect the scores of their own query heads; a budget counts the blocks, and is met: where every block that could still
lose something gains as much as a step takes, all lose a step alike (theirs: stops short); units that have left are
zero, and not cut, until the end. Units by other scores follow such shares with the allocator `adapt`, which looks at
the dense model once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from secateur.allocate import MOST, normalised
from secateur.methods import Descriptor, IterativeMethod, option, register

_METRICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cosine": lambda before, after: -F.cosine_similarity(before, after, dim=-1),
    "euclidean": lambda before, after: (after - before).norm(dim=-1),
    "manhattan": lambda before, after: (after - before).abs().sum(dim=-1),
}


@register("adapt_pruner")
@dataclass(frozen=True, kw_only=True)
class AdaptPruner(IterativeMethod):
    """Options of Adapt-Pruner; amplitude and steps are those of the published runs, the windows of a step fewer."""

    amplitude: float = option(0.02, "how far one step moves the most important block", unit="sparsity")
    steps: int = option(50, "steps that would remove everything", ge=1)
    metric: str = option("cosine", "what tells how much a block counts", choices=tuple(_METRICS))
    official_sign: bool = option(False, "let distances count against a block, as the official code does")
    first: int = option(0, "blocks at the beginning that stay whole", unit="blocks", ge=0)
    last: int = option(0, "blocks at the end that stay whole", unit="blocks", ge=0)

    costly: ClassVar[bool] = True
    descriptor: ClassVar = Descriptor(
        object="heads_and_neurons",
        granularity="structured_group",
        score="gradient",
        allocation="global",
        data="unlabelled_calibration",
        speedup="real",
    )

    def cuts(self, layer: int, layers: int) -> bool:
        return self.first <= layer < layers - self.last

    def importance(self, before_BTD: Tensor, after_BTD: Tensor) -> float:
        summed = float(_METRICS[self.metric](before_BTD, after_BTD).double().sum())
        return -summed if self.official_sign and self.metric != "cosine" else summed

    def salience(self, weight: Tensor, gradient: Tensor) -> Tensor:
        return (weight * gradient).abs()

    def advance(self, sparsities: NDArray[np.float64], importance: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.clip(sparsities + self.step - self.amplitude * normalised(importance), 0.0, MOST)

    @property
    def step(self) -> float:
        return 1 / self.steps

    def rounds(self) -> int:
        return max(1, round(self.sparsity * self.steps / self.refresh))
