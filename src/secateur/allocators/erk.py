"""ERK: small and narrow matrices stay denser than large square ones.

    keep_l = eps * ((outputs + inputs) / (outputs * inputs))^power       eps such that the whole is met

Where a keep would exceed 1 the matrix stays dense, and eps is found again for the others. No data.

Source: U. Evci et al., "Rigging the Lottery", ICML 2020, arXiv:1911.11134, section 3 (Erdos-Renyi-Kernel; a matrix has
no kernel, so that this is Erdos-Renyi); official code google-research/rigl, whose `erk_power_scale` is `power`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from secateur.allocate import erk
from secateur.allocators.base import Allocator, Part, Wishes
from secateur.allocators.registry import allocator
from secateur.methods import option


@allocator("erk")
@dataclass(frozen=True, kw_only=True)
class ERK(Allocator):
    """Options of ERK; the default is that of the official code."""

    power: float = option(1.0, "exponent of the scale; 0 is uniform", ge=0)

    def sparsities(self, parts: Sequence[Part], measured: Sequence[Tensor], sparsity: float) -> Wishes:
        return 1.0 - erk([part.shape for part in parts], 1.0 - sparsity, self.power)
