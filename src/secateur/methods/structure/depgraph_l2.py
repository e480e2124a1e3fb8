"""DepGraph's group magnitude: remove the coupled channels whose weights are small, each layer counting the same.

    I_k,p = sum over the entries w of slice k of parameter p of  w^2        rows, columns and norm scales, no biases
    I_k   = mean over the parameters p of the group of I_k,p
    I_k  <- I_k / mean over the channels of the group

The channels with the smallest I of the whole network leave. No data, no compensation.

Source: G. Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023, arXiv:2301.12900; official code
VainF/Torch-Pruning 1.6 (GroupMagnitudeImportance, p=2, group_reduction="mean", normalizer="mean"). Differs from it:
the groups, which come from the index maps of operators; it couples by layers and treats unknown operators as
element-wise. Its group-sparse training is not part of this method.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.criteria.groups import REDUCTIONS
from secateur.methods import ChannelMethod, Coupled, Descriptor, option, register


@register("depgraph_l2")
@dataclass(frozen=True, kw_only=True)
class DepGraphL2(ChannelMethod):
    """Options of the group magnitude of DepGraph."""

    p: float = option(2.0, "exponent of the weights", gt=0)
    reduction: str = option("mean", "how the parameters of a group are put together", choices=("mean", "sum", "max"))

    descriptor: ClassVar = Descriptor(
        object="channels",
        granularity="structured_group",
        score="magnitude",
        allocation="global",
        data="none",
        speedup="real",
    )

    def score(self, group: Coupled) -> Tensor | None:
        rows = [p.per_unit(p.weight.double().abs() ** self.p).sum(dim=1) for p in group.parts if p.role != "bias"]
        return REDUCTIONS[self.reduction](torch.stack(rows, dim=1)) if rows else None
