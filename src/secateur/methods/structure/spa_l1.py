"""SPA-L1: remove the coupled channels whose parameters are small, in any network.

Channels that must leave together (a residual stream, a head with its queries, keys and values) are found by tracing
and scored together.

    s(w) = |w|
    I_k  = sum over the coupled slices of channel k, over their entries, of s(w)
    I_k <- I_k / mean over the channels of the group        groups compete on one scale

The channels with the smallest I leave until the budget is met; a group keeps at least one. No data, no compensation.

Source: X. Wang et al., "Structurally Prune Anything: Any Architecture, Any Framework, Any Time", 2024,
arXiv:2403.18955. No official code is public; sum and mean are the constants of our reconstruction.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.methods import ChannelMethod, Descriptor, Part, register


@register("spa_l1")
@dataclass(frozen=True, kw_only=True)
class SPAL1(ChannelMethod):
    """Options of SPA with the magnitude."""

    descriptor: ClassVar = Descriptor(
        object="channels",
        granularity="structured_group",
        score="magnitude",
        allocation="global",
        data="none",
        speedup="real",
    )

    def importance(self, part: Part) -> Tensor:
        return part.weight.abs()
