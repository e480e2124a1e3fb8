"""Influence: blocks that change the residual stream stay denser.

    BI_l   = 1 - mean over tokens of cos(h_l, h_{l+1})        h_l enters block l, h_{l+1} leaves it
    keep_l = 2 * lam * (BI_l - min BI) / (max BI - min BI),   then shifted so that the mean is 1 - sparsity

All matrices of a block get the same sparsity; the sparsities span 2 * lam.

Source: Block Influence is that of X. Men et al., "ShortGPT", 2024, arXiv:2403.03853, which removes whole blocks by it.
How it becomes a sparsity is the map of OWL (arXiv:2310.05175), with the same default span.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from secateur.allocate import fit_sparsities
from secateur.allocators.base import Allocator, BlockWeights, Part, Wishes, of_blocks, sizes_of, spread_over
from secateur.allocators.registry import allocator
from secateur.methods import option
from secateur.observe import Similarity


@allocator("influence")
@dataclass(frozen=True, kw_only=True)
class Influence(Allocator):
    """Options of the allocation by Block Influence."""

    lam: float = option(0.08, "half the span of the sparsities", ge=0, le=1)

    observes: ClassVar[str] = "blocks"
    statistics: ClassVar = {"similarity": Similarity}
    measures: ClassVar[bool] = True
    shares: ClassVar[bool] = True

    def measure(self, block: BlockWeights, method: Any) -> Tensor:
        return torch.tensor(1.0 - block.seen[""]["similarity"].mean, dtype=torch.float64)

    def sparsities(self, parts: Sequence[Part], measured: Sequence[Tensor], sparsity: float) -> Wishes:
        keep = spread_over(of_blocks(parts, [float(influence) for influence in measured]), 2 * self.lam)
        return fit_sparsities(-keep, sizes_of(parts), sparsity)
