"""Random channels: remove coupled channels of any network by the toss of a coin; what any score must beat.

I_k uniform in [0, 1), drawn per group from the seed and the group's name
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.criteria import random_scores
from secateur.methods import ChannelMethod, Coupled, Descriptor, option, register


@register("random_channels")
@dataclass(frozen=True, kw_only=True)
class RandomChannels(ChannelMethod):
    """Options of random channel pruning."""

    normalizer: str = option("none", "what the scores of a group are divided by", choices=("none",))
    seed: int = option(0, "seed of the scores", ge=0)

    descriptor: ClassVar = Descriptor(
        object="channels",
        granularity="structured_group",
        score="random",
        allocation="global",
        data="none",
        speedup="real",
    )

    def score(self, group: Coupled) -> Tensor:
        return random_scores(group.name, self.seed, (group.units,)).double()
