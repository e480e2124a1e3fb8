"""RigL: the smallest weights give way to the connections whose gradients are largest.

    f(t) = alpha / 2 * (1 + cos(pi * t / T_end))                      fraction that is exchanged

Starts at a random mask by ERK. Every `every` steps until T_end, in every layer, int(f(t) * live) of the live weights
that are smallest in magnitude leave, and as many of the others with the largest |dL/dw| become live, at zero and
without momentum; one that left just now keeps its value. The number of weights of a layer never changes. Where masks
change, the optimizer's step is not taken. By default `end` (T_end) is three quarters of `steps`.

Source: U. Evci et al., "Rigging the Lottery: making all tickets winners", ICML 2020, arXiv:1911.11134 (alpha = 0.3,
every 100 steps, T_end = 3/4 of the training); official code google-research/rigl, whose noise against ties is `noise`.
Differs from it: the step that isn't taken is taken back afterwards, so that any optimizer and loop will do.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.methods import Descriptor, DynamicMethod, Trained, option, register


@register("rigl")
@dataclass(frozen=True, kw_only=True)
class RigL(DynamicMethod):
    """Options of RigL; defaults from the paper."""

    noise: float = option(1e-5, "standard deviation of what is added to magnitudes, against ties", ge=0)

    skips: ClassVar = True
    descriptor: ClassVar = Descriptor(
        object="weights",
        granularity="element",
        when="during_training",
        score="magnitude",
        allocation="erk",
        recovery="training",
        data="training_batches",
        speedup="memory_only",
    )

    def score(self, part: Trained) -> Tensor:
        return part.weight.abs() + self.noise * part.normal("noise")
