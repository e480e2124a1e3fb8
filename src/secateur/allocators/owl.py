"""OWL: blocks with many outliers stay denser.

    S_ij   = |W_ij| * sqrt(a_j)      Wanda's score, all matrices of a block pooled
    r_l    = 100 * fraction of the S of block l that exceed m * mean(S)
    keep_l = 2 * lam * (r_l - min r) / (max r - min r),  then shifted so that the mean is 1 - sparsity

All matrices of a block get the same sparsity; the sparsities span 2 * lam. With an N:M pattern the N of whole blocks
is shifted instead, by whole numbers that span 2 * lam_pattern. Seen is the dense model.

Source: L. Yin et al., "Outlier Weighed Layerwise Sparsity (OWL)", ICML 2024, arXiv:2310.05175; official code
luuyin/OWL. Differs from it: the mean is weighted by the sizes of the blocks; blocks that all have the same r_l get the
same sparsity (theirs: 0/0); no block is pushed beyond [0, 0.99] (theirs: keep at least 1 %); with a pattern the shifts
sum to zero.
The default m = 5 is that of every command in its README (the code's own default is 3).
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.allocate import fit_sparsities
from secateur.allocators.base import Allocator, BlockWeights, Part, Wishes, of_blocks, sizes_of, spread_over
from secateur.allocators.registry import allocator
from secateur.criteria import weighted_magnitude
from secateur.methods import WeightMethod, option
from secateur.observe import SumSquares


@allocator("owl")
@dataclass(frozen=True, kw_only=True)
class OWL(Allocator):
    """Options of OWL; defaults from the official README."""

    m: float = option(5.0, "an outlier exceeds this many times the mean score of its block", gt=0)
    lam: float = option(0.08, "half the span of the sparsities", ge=0, le=1)
    lam_pattern: float = option(2.0, "half the span of N, with an N:M pattern", unit="zeros", ge=0)

    observes: ClassVar[str] = "inputs"
    statistics: ClassVar = {"squares": SumSquares}
    measures: ClassVar[bool] = True

    def for_pattern(self, m: int) -> "OWL":
        return dataclasses.replace(self, lam=min(self.lam_pattern / m, 1.0))

    def measure(self, block: BlockWeights, method: WeightMethod) -> Tensor:
        scores = []
        for target in block.targets:
            square_sum_I = block.seen[target.name]["squares"].mean_per_sequence().to(target.weight.device)
            scores.append(weighted_magnitude(target.weight, square_sum_I))
        return torch.tensor(outlier_percentage(scores, self.m), dtype=torch.float64)

    def sparsities(self, parts: Sequence[Part], measured: Sequence[Tensor], sparsity: float) -> Wishes:
        keep = spread_over(of_blocks(parts, [float(percentage) for percentage in measured]), 2 * self.lam)
        return fit_sparsities(-keep, sizes_of(parts), sparsity)


def outlier_percentage(scores: Sequence[Tensor], m: float) -> float:
    """Percentage of all entries of the tensors that exceed ``m`` times their common mean."""
    # a block that has lost both of its sub-layers has none
    entries = max(sum(s.numel() for s in scores), 1)
    mean = sum(float(s.double().sum()) for s in scores) / entries
    return 100.0 * sum(int((s > m * mean).sum()) for s in scores) / entries
