"""OBD: remove the coupled channels that a loss at its minimum would miss least, to second order.

    s(w) = 1/2 * H_ww * w^2                         H_ww = d^2 L / dw^2, the diagonal of the Hessian
    I_k  = sum over the coupled slices of channel k, over their entries, of s(w)

The diagonal is estimated by products of the Hessian with random signs z (Hutchinson):  H_ww = mean of z_w (H z)_w,
which is exact where the Hessian is diagonal; `probes` says how many. The gradient is taken to be zero, which holds for
a trained network; `taylor` with order 2 keeps it. A channel with a negative score leaves first.

Source: Y. LeCun, J. Denker and S. Solla, "Optimal Brain Damage", NIPS 1989, eq. 2 to 5. Differs from it: the
diagonal of the true Hessian from random probes instead of the Levenberg-Marquardt approximation by its own
backward pass; coupled channels instead of single weights.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.methods import ChannelMethod, Descriptor, Part, option, register


@register("obd")
@dataclass(frozen=True, kw_only=True)
class OBD(ChannelMethod):
    """Options of Optimal Brain Damage."""

    normalizer: str = option("none", "what the scores of a group are divided by", choices=("none", "mean", "max"))
    probes: int = option(16, "random products from which the diagonal is estimated, for every batch", ge=1)

    needs: ClassVar = ("diagonal",)
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
        return 0.5 * part.diagonal * part.weight.square()
