"""FPGM: remove the coupled channels that the others could replace, those nearest to the geometric median.

    w_k,p = the entries of channel k in the weight p
    D_k   = sum over the weights p of the group of  sum over the channels j of  ||w_k,p - w_j,p||_2

The point with the smallest sum of distances to all channels is their geometric median; a channel near it carries
what the others carry as well, however large it is. Every group loses the same share of its channels. No data.

Source: Y. He et al., "Filter Pruning via Geometric Median for Deep Convolutional Neural Networks Acceleration", CVPR
2019, arXiv:1811.00250, eq. 6 and 7. There it is one convolution's filters; lifting it to the rows and columns of all
weights of a group is ours. Differs from it: no fine-tuning in between, and no mixing with small norms.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.allocate import CHANNEL_SCOPES
from secateur.criteria.groups import REDUCTIONS
from secateur.methods import ChannelMethod, Coupled, Descriptor, option, register


@register("fpgm")
@dataclass(frozen=True, kw_only=True)
class FPGM(ChannelMethod):
    """Options of FPGM."""

    scope: str = option(
        "uniform", "all channels are ranked together, or every group loses the same share", choices=CHANNEL_SCOPES
    )

    descriptor: ClassVar = Descriptor(
        object="channels",
        granularity="structured_group",
        score="similarity",
        allocation="uniform",
        data="none",
        speedup="real",
    )

    def score(self, group: Coupled) -> Tensor | None:
        weights = [p.per_unit(p.weight.double()) for p in group.parts if p.role == "weight"]
        if not weights:
            return None
        rows = [torch.cdist(w_UE, w_UE).sum(dim=1) for w_UE in weights]
        return REDUCTIONS[self.reduction](torch.stack(rows, dim=1))
