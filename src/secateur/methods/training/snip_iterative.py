"""Iterative SNIP: SNIP in rounds, so that what is left is scored without what has gone.

    density after round k of n = (1 - sparsity)^(k / n)
    s_j = |theta_j * dL/dtheta_j| of the network with the mask of the round before

Many small rounds avoid the layers that SNIP empties at high sparsities.

Source: S. Verdenius et al., "Pruning via iterative ranking of sensitivity statistics" (SNIP-it), 2020,
arXiv:2006.00896; P. de Jorge et al., "Progressive skeletonization" (Iterative SNIP), ICLR 2021, arXiv:2006.09081, which
also lets weights come back (FORCE): here they don't.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.criteria.connections import snip
from secateur.methods import Descriptor, StartingMethod, Trained, option, register


@register("snip_iterative")
@dataclass(frozen=True, kw_only=True)
class IterativeSNIP(StartingMethod):
    """Options of iterative SNIP."""

    rounds: int = option(100, "rounds of scoring and removing", unit="rounds", ge=1)

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
