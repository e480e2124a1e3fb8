"""Adapt: Adapt-Pruner's increments, blocks whose output points away from their input stay denser.

    I_l      = -mean over tokens of cos(h_l, h_{l+1}),   less its mean over blocks, over the largest |I|
    s_l(t+1) = clip(s_l(t) + 1 / steps - amplitude * I_l, 0, 0.99),   s_l(0) = 0

The steps end when the weighted mean of s reaches the sparsity; the last one is taken in part. All matrices of a block
get the same sparsity; equal cosines give all blocks the same.

Source: "Adapt-Pruner: Adaptive Structural Pruning for Efficient Small Language Model Training", 2025, arXiv:2502.03460;
official code research4pan/AdaptPruner, which removes heads and neurons this way. Amplitude and steps are those of its
shipped runs.
Differs from it: importances are taken once, from the dense model, and not anew after every step, as the method
`adapt_pruner` does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from secateur.allocate import MOST, fit_sparsities, normalised
from secateur.allocators.base import Allocator, BlockWeights, Part, Wishes, of_blocks, sizes_of
from secateur.allocators.registry import allocator
from secateur.methods import option
from secateur.observe import Similarity


@allocator("adapt")
@dataclass(frozen=True, kw_only=True)
class Adapt(Allocator):
    """Options of Adapt-Pruner's allocation; defaults of the published runs."""

    amplitude: float = option(0.02, "how far one step moves the most important block", unit="sparsity", ge=0)
    steps: int = option(50, "steps that would remove everything", ge=1)

    observes: ClassVar[str] = "blocks"
    statistics: ClassVar = {"similarity": Similarity}
    measures: ClassVar[bool] = True
    shares: ClassVar[bool] = True

    def measure(self, block: BlockWeights, method: Any) -> Tensor:
        return torch.tensor(-block.seen[""]["similarity"].mean, dtype=torch.float64)

    def sparsities(self, parts: Sequence[Part], measured: Sequence[Tensor], sparsity: float) -> Wishes:
        sizes = sizes_of(parts)
        values = np.array([float(value) for value in measured])
        # among the blocks that have something to lose
        there = sorted({part.layer for part in parts})
        values[there] = normalised(values[there])
        importance = of_blocks(parts, values)
        low, high = 0.0, 2.0 * self.steps
        # a block of nearly the largest importance takes nearly for ever: what it leaves over the others share
        while low < (middle := (low + high) / 2) < high:
            enough = np.average(self.after(middle, importance), weights=sizes) >= sparsity
            low, high = (low, middle) if enough else (middle, high)
        return fit_sparsities(self.after(high, importance), sizes, sparsity)

    def after(self, steps: float, importance: Wishes) -> Wishes:
        """Sparsities [parts] after this many steps, the last one in part: with fixed importances all are the same."""
        return np.clip(steps * (1 / self.steps - self.amplitude * importance), 0.0, MOST)
