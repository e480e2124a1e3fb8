"""Magnitude-sp: remove heads and FFN neurons whose outgoing weights are small.

    c_j    = ||W_:,j||_2        W is o_proj or down_proj, j one of its input channels
    head   = sum of c_j over the channels of the head

Every layer loses the same share. No data, no compensation.

Source: the structured magnitude baseline of CASIA-IVA-Lab/FLAP (`mag_sp`). Differs from that code: what whole
key-value heads leave over of a layer's share comes out of its neurons, so that the budget is met (option `fill`).
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.allocate import Allocator, UniformAllocator
from secateur.criteria import column_energy, per_unit
from secateur.methods import Descriptor, Seen, Target, UnitMethod, option, register


@register("magnitude_sp")
@dataclass(frozen=True, kw_only=True)
class MagnitudeSP(UnitMethod):
    """Options of structured magnitude pruning."""

    fill: bool = option(True, "meet the budget exactly by taking what coarse heads leave over from the neurons")

    descriptor: ClassVar = Descriptor(
        object="heads_and_neurons",
        granularity="structured_group",
        score="magnitude",
        allocation="uniform",
        data="none",
        speedup="real",
    )

    def score(self, target: Target, seen: Seen) -> Tensor:
        return per_unit(column_energy(target.weight).sqrt(), target.columns, "sum")

    def allocator(self) -> Allocator:
        return UniformAllocator(self.sparsity, self.fill)
