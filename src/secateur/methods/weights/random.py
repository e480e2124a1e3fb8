"""Random: remove weights by lot; the floor that every criterion must beat.

    score_ij ~ U(0, 1), one generator per matrix, seeded by (seed, name of the matrix)

Source: the usual control, as in Frankle & Carbin 2019, arXiv:1803.03635, section 4.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.allocate import MaskRule, mask_rule
from secateur.criteria import random_scores
from secateur.methods import Descriptor, Seen, Target, WeightMethod, option, register


@register("random")
@dataclass(frozen=True, kw_only=True)
class Random(WeightMethod):
    """Options of random pruning."""

    seed: int = option(0, "seed of the lot", ge=0)

    descriptor: ClassVar = Descriptor(
        object="weights",
        granularity="element",
        score="random",
        allocation="uniform",
        data="none",
        speedup="memory_only",
    )

    def score(self, target: Target, seen: Seen) -> Tensor:
        return random_scores(target.name, self.seed, target.weight.shape).to(target.weight.device)

    def rule(self) -> MaskRule:
        return mask_rule(self.pattern, self.sparsity, "layer")
