"""Uniform: every matrix loses the same fraction.

What methods do without an allocator, to within one weight: here the remainders of rounding go to the next matrix, so
that the whole is met.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from secateur.allocators.base import Allocator, Part, Wishes
from secateur.allocators.registry import allocator


@allocator("uniform")
@dataclass(frozen=True, kw_only=True)
class Uniform(Allocator):
    """It has no options."""

    shares: ClassVar[bool] = True

    def sparsities(self, parts: Sequence[Part], measured: Sequence[Tensor], sparsity: float) -> Wishes:
        return np.full(len(parts), sparsity)
