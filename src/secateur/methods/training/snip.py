"""SNIP: before training, keep the connections to which the loss is most sensitive.

    s_j = |theta_j * dL/dtheta_j| / sum_k |theta_k * dL/dtheta_k|             (eq. 4)

One mini-batch decides; all weights compete. The mask is laid once and the network is trained under it.

Source: N. Lee et al., "SNIP: single-shot network pruning based on connection sensitivity", ICLR 2019,
arXiv:1810.02340; official code namhoonlee/snip-public. Differs from it: biases stay, weights aren't drawn anew for the
score (variance scaling there), and dropout and the like are off while scoring. The sum changes no order, and is left
out.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.criteria.connections import snip
from secateur.methods import Descriptor, StartingMethod, Trained, register


@register("snip")
@dataclass(frozen=True, kw_only=True)
class SNIP(StartingMethod):
    """Options of SNIP."""

    needs: ClassVar = ("gradient",)
    descriptor: ClassVar = Descriptor(
        object="weights",
        granularity="element",
        when="before_training",
        score="gradient",
        allocation="global",
        data="labelled_calibration",
        supervision="labels",
        speedup="memory_only",
    )

    def score(self, part: Trained) -> Tensor:
        return snip(part.weight, part.gradient)
