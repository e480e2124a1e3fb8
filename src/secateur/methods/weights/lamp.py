"""LAMP: magnitude on a scale on which the matrices of a model can compete.

    score(u) = W_u^2 / sum over the weights v of its matrix with |W_v| >= |W_u| of W_v^2          (eq. 3)

The largest weight of every matrix has the score 1 and stays, so that no matrix is ever emptied. The lowest scores of
the whole model leave: how much each matrix loses follows from that, without a setting. No data.

Source: J. Lee et al., "Layer-adaptive Sparsity for the Magnitude-based Pruning", ICLR 2021, arXiv:2010.07611. Equal
weights get different scores by their order, as in the paper.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.allocate import MaskRule, mask_rule
from secateur.criteria import lamp
from secateur.methods import Descriptor, Seen, Target, WeightMethod, option, register


@register("lamp")
@dataclass(frozen=True, kw_only=True)
class LAMP(WeightMethod):
    """Options of LAMP."""

    scope: str = option(
        "global", "who competes: all matrices, which is the method, or one", choices=("global", "layer")
    )

    descriptor: ClassVar = Descriptor(
        object="weights",
        granularity="element",
        score="magnitude",
        allocation="global",
        data="none",
        speedup="memory_only",
    )

    def score(self, target: Target, seen: Seen) -> Tensor:
        return lamp(target.weight.square().flatten()).reshape(target.weight.shape)

    def rule(self) -> MaskRule:
        return mask_rule(self.pattern, self.sparsity, self.scope)
