"""SPA-CroP: remove the coupled channels that change the gradient flow least, in any network, also an untrained one.

    g    = dL/dw,  H its Hessian
    s(w) = |w * (H g)|                the magnitude of GraSP's product: the norm of the gradient is conserved
    I_k  = sum over the coupled slices of channel k, over their entries, of s(w)
    I_k <- I_k / mean over the channels of the group

Source: X. Wang et al., "Structurally Prune Anything", 2024, arXiv:2403.18955; the score of single weights from
J. Rachwan et al., "Winning the Lottery Ahead of Time: Efficient Early Network Pruning", ICML 2022, arXiv:2206.10451.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.methods import ChannelMethod, Descriptor, Part, register


@register("spa_crop")
@dataclass(frozen=True, kw_only=True)
class SPACroP(ChannelMethod):
    """Options of SPA with CroP's conserved gradient flow."""

    needs: ClassVar = ("curvature",)
    descriptor: ClassVar = Descriptor(
        object="channels",
        granularity="structured_group",
        score="second_order",
        allocation="global",
        data="labelled_calibration",
        supervision="labels",
        speedup="real",
    )

    def importance(self, part: Part) -> Tensor:
        return (part.weight * part.curvature).abs()
