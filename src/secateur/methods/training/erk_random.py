"""ERK: a random mask before training whose layers have the densities of Erdos-Renyi-Kernel; it never changes.

    density_l = eps * (sum of the sizes of w_l / product of the sizes)^power

eps is such that the whole has the density that is asked for; where a density would exceed 1 the layer stays dense, and
eps is found again for the others. The baseline of sparse training ("static"), and where SET, RigL and GraNet start.

Source: U. Evci et al., "Rigging the Lottery", ICML 2020, arXiv:1911.11134, section 3; official code
google-research/rigl. Differs from it: numbers of weights are rounded so that their sum is met.
"""

from dataclasses import dataclass
from typing import ClassVar

from secateur.methods import Descriptor, TrainingMethod, option, register


@register("erk_random")
@dataclass(frozen=True, kw_only=True)
class ERKRandom(TrainingMethod):
    """Options of static random masks."""

    distribution: str = option("erk", "density of the layers", choices=("erk", "uniform"))

    descriptor: ClassVar = Descriptor(
        object="weights",
        granularity="element",
        when="before_training",
        score="random",
        allocation="erk",
        data="none",
        speedup="memory_only",
    )

    def random_start(self) -> str:
        return self.distribution
