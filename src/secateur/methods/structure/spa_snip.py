"""SPA-SNIP: remove the coupled channels to which the loss is least sensitive, in any network, also an untrained one.

    s(w) = |w * dL/dw|
    I_k  = sum over the coupled slices of channel k, over their entries, of s(w)
    I_k <- I_k / mean over the channels of the group

The gradient is that of the mean loss over the data that is given. The channels with the smallest I leave.

Source: X. Wang et al., "Structurally Prune Anything", 2024, arXiv:2403.18955; the score of single weights from
N. Lee et al., "SNIP", ICLR 2019, arXiv:1810.02340. Differs from SNIP: scores aren't divided by their sum, which changes
no order.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.criteria.connections import snip
from secateur.methods import ChannelMethod, Descriptor, Part, register


@register("spa_snip")
@dataclass(frozen=True, kw_only=True)
class SPASNIP(ChannelMethod):
    """Options of SPA with SNIP's sensitivity."""

    needs: ClassVar = ("gradient",)
    descriptor: ClassVar = Descriptor(
        object="channels",
        granularity="structured_group",
        score="gradient",
        allocation="global",
        data="labelled_calibration",
        supervision="labels",
        speedup="real",
    )

    def importance(self, part: Part) -> Tensor:
        return snip(part.weight, part.gradient)
