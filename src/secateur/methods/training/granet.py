"""GraNet: the sparsity grows by a cubic ramp, and at every update some weights are regrown where gradients are large.

    s_t = s_i + (s_f - s_i) * (1 - (1 - (t - t_0) / (t_f - t_0))^3)       smallest weights of all layers leave
    p_t = 0.005 + (p_0 - 0.005) / 2 * (1 + cos(pi * t / T))               fraction of a layer that is then exchanged

With s_i = 0 the network starts dense ("dense to sparse"), with s_i = 0.5 at a random mask by ERK ("sparse to sparse").
After the ramp the exchange goes on until the training ends: ceil(p_t * live) of the smallest live weights of every
layer leave and as many of the dead ones with the largest |dL/dw| become live, at zero; one that left in the same
exchange keeps its value. With p_0 = 0 this is GMP with all weights competing. By default `end` (t_f) is
half of `steps` (T).

Source: S. Liu et al., "Sparse training via boosting pruning plasticity with neuroregeneration", NeurIPS 2021,
arXiv:2106.10404; official code Shiweiliuiiiiiii/GraNet. Differs from it: numbers of weights are met by index, where its
thresholds lose one more and ties; random masks have exact numbers; the ramp reaches s_f, of which the code stays
(s_f - s_i) / n^3 short.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.allocate import SCOPES, Cosine, Updates
from secateur.methods import Descriptor, GradualMethod, Trained, option, register
from secateur.methods.during import GROWTHS, looks_at

LEAST = 0.005


@register("granet")
@dataclass(frozen=True, kw_only=True)
class GraNet(GradualMethod):
    """Options of GraNet; defaults from the official code, for CIFAR."""

    every: int = option(1000, "from one update to the next", unit="steps", ge=1)
    scope: str = option("global", "every layer loses the same fraction, all compete, or by ERK", choices=SCOPES)
    fraction: float = option(0.5, "of the live weights that is exchanged at step 0 (p_0); 0 for none", ge=0, lt=1)
    decay: str = option("cosine", "how that falls until the training ends", choices=("cosine", "constant"))
    growth: str = option("gradient", "what grows first among dead weights", choices=tuple(GROWTHS))

    ends: ClassVar = 0.5
    descriptor: ClassVar = Descriptor(
        object="weights",
        granularity="element",
        when="during_training",
        score="magnitude",
        allocation="global",
        recovery="training",
        data="training_batches",
        speedup="memory_only",
    )

    def needed(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*super().needed(), *(looks_at(self.growth) if self.fraction else ()))))

    def updates(self) -> Updates:
        return Updates(self.begin, self.steps or self.last, self.every)

    def rate(self, step: int) -> float:
        if self.fraction <= LEAST or self.decay == "constant":
            return self.fraction
        return Cosine(self.fraction, LEAST, self.steps or self.last)(step)

    def exchanged(self, live: int, rate: float) -> int:
        return math.ceil(rate * live)

    def growing(self, part: Trained) -> Tensor:
        return GROWTHS[self.growth](part)
