"""HRank: remove the coupled channels whose feature maps have the lowest rank on average.

    I_k = mean over the places in which channel k is a feature map of
          mean over images of  rank(map of channel k)

A map of low rank holds less that is new, and its average rank hardly depends on which images are taken: some hundreds
do (the paper takes 500). The map is what a weight reads, behind norms and activation functions, but before it is
pooled; where channels are read in several places, as those of a residual stream, the places are averaged. Every group
loses the same share of its channels. Labels aren't looked at.

A channel has a rank where it lies in at least two rows and columns. Of a single position (a hidden layer of a
classifier, the gate of squeeze-and-excitation) the rank says whether it is zero and no more, so groups without maps
stay, and a network without any is refused.

Source: M. Lin et al., "HRank: Filter Pruning using High-Rank Feature Map", CVPR 2020, arXiv:2002.10179; official code
lmbxmu/HRank at c03ac85 (rank_generation.py, five batches of 128 images). As there, ranks are those of
torch.linalg.matrix_rank with its default tolerance. Lifting the rank of one layer's maps to coupled groups is ours.
Differs from the official code: shares of channels follow from the sparsity and not from a list of rates by layer, and
there is no fine-tuning in between.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.allocate import CHANNEL_SCOPES
from secateur.criteria.groups import mean_of_places
from secateur.methods import ChannelMethod, Coupled, Descriptor, option, register


@register("hrank")
@dataclass(frozen=True, kw_only=True)
class HRank(ChannelMethod):
    """Options of HRank."""

    scope: str = option(
        "uniform", "all channels are ranked together, or every group loses the same share", choices=CHANNEL_SCOPES
    )

    needs: ClassVar = ("maps",)
    descriptor: ClassVar = Descriptor(
        object="channels",
        granularity="structured_group",
        score="activation",
        allocation="uniform",
        data="unlabelled_calibration",
        speedup="real",
    )

    def score(self, group: Coupled) -> Tensor | None:
        if not group.maps:
            return None
        ranks = [(maps.ranks.mean_C().cpu(), maps.channels) for maps in group.maps]
        return mean_of_places(ranks, torch.mean)
