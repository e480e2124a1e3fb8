"""Wanda-sp: Wanda's score summed into heads and FFN neurons.

    c_j    = mean over outputs i of |W_ij| * sqrt(a_j)     W is o_proj or down_proj, j one of its input channels
    a_j    = (1/n) * sum over the n calibration sequences of ||X_j||_2^2
    head   = sum of c_j over the channels of the head

Every layer loses the same share; blocks are calibrated in sequence, each sees what the cut ones before it give.

Source: the baseline of CASIA-IVA-Lab/FLAP (`wanda_sp`). Differs from that code: what whole key-value heads leave
over of a layer's share comes out of its neurons, so that the budget is met (option `fill`); its average over the
empty rows of the input buffer, which scales all scores alike, is left out.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.allocate import Allocator, UniformAllocator
from secateur.criteria import per_unit, weighted_magnitude
from secateur.methods import Descriptor, Seen, Target, UnitMethod, option, register
from secateur.observe import SumSquares


@register("wanda_sp")
@dataclass(frozen=True, kw_only=True)
class WandaSP(UnitMethod):
    """Options of Wanda-sp."""

    fill: bool = option(True, "meet the budget exactly by taking what coarse heads leave over from the neurons")

    statistics: ClassVar = {"squares": SumSquares}
    sequential: ClassVar[bool] = True
    descriptor: ClassVar = Descriptor(
        object="heads_and_neurons",
        granularity="structured_group",
        score="activation",
        allocation="uniform",
        data="unlabelled_calibration",
        speedup="real",
    )

    def score(self, target: Target, seen: Seen) -> Tensor:
        square_sum_I = seen["squares"].mean_per_sequence().to(target.weight.device)
        channel_I = weighted_magnitude(target.weight, square_sum_I).double().mean(dim=0)
        return per_unit(channel_I, target.columns, "sum")

    def allocator(self) -> Allocator:
        return UniformAllocator(self.sparsity, self.fill)
