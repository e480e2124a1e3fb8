"""Random-sp: remove heads and FFN neurons by lot; the floor that every structured criterion must beat.

    score_u ~ U(0, 1), one generator per group, seeded by (seed, name of the group)

Every layer loses the same share. Source: the usual control; as "random groups" in Ma et al., LLM-Pruner,
NeurIPS 2023, arXiv:2305.11627, table 1.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.allocate import Allocator, UniformAllocator
from secateur.criteria import random_scores
from secateur.methods import Descriptor, Seen, Target, UnitMethod, option, register


@register("random_sp")
@dataclass(frozen=True, kw_only=True)
class RandomSP(UnitMethod):
    """Options of random structured pruning."""

    fill: bool = option(True, "meet the budget exactly by taking what coarse heads leave over from the neurons")
    seed: int = option(0, "seed of the lot", ge=0)

    descriptor: ClassVar = Descriptor(
        object="heads_and_neurons",
        granularity="structured_group",
        score="random",
        allocation="uniform",
        data="none",
        speedup="real",
    )

    def score(self, target: Target, seen: Seen) -> Tensor:
        return random_scores(target.name, self.seed, (target.units,))

    def allocator(self) -> Allocator:
        return UniformAllocator(self.sparsity, self.fill)
