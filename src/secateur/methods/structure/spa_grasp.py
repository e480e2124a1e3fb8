"""SPA-GraSP: remove the coupled channels without which the gradient flows best, in any untrained network.

    g    = dL/dw,  H its Hessian
    s(w) = w * (H g)                  GraSP removes the weights with the highest -w * (H g)
    I_k  = sum over the coupled slices of channel k, over their entries, of s(w)
    I_k <- I_k / |mean over the channels of the group|

Source: X. Wang et al., "Structurally Prune Anything", 2024, arXiv:2403.18955; the score of single weights from
C. Wang et al., "Picking Winning Tickets Before Training by Preserving Gradient Flow", ICLR 2020, arXiv:2002.07376.
Differs from GraSP: the loss is taken as it is given (theirs divides the logits by a temperature of 200).
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.criteria.connections import grasp
from secateur.methods import ChannelMethod, Descriptor, Part, register


@register("spa_grasp")
@dataclass(frozen=True, kw_only=True)
class SPAGraSP(ChannelMethod):
    """Options of SPA with GraSP's preserved gradient flow."""

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
        return grasp(part.weight, part.curvature)
