"""Network slimming: remove the channels whose batch-norm scale is small.

    I_k = |gamma_k|, summed over the norms of channel k when several layers share a residual stream

gamma is the scale of the norm behind a channel; networks are trained with an L1 penalty on it, which pushes the scales
of channels that aren't needed to zero. One threshold over all channels of the network; groups without a norm stay.

Source: Z. Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", ICCV 2017,
arXiv:1708.06519; re-implementation Eric-mingjie/network-slimming. The penalty belongs to training: add
1e-4 * sum |gamma| to the loss. Differs from it: the budget is met in true parameters or operations, coupled layers are
cut together, and a group keeps at least one channel.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.methods import ChannelMethod, Descriptor, Part, option, register


@register("slimming")
@dataclass(frozen=True, kw_only=True)
class Slimming(ChannelMethod):
    """Options of network slimming."""

    normalizer: str = option("none", "what the scores of a group are divided by", choices=("none", "mean", "max"))

    descriptor: ClassVar = Descriptor(
        object="channels",
        granularity="structured_group",
        score="magnitude",
        allocation="global",
        data="none",
        speedup="real",
    )

    def importance(self, part: Part) -> Tensor | None:
        return part.weight.abs() if part.role == "scale" else None
