"""Global: all weights compete at one threshold, on scores that are standardised matrix by matrix.

    z_ij = (score_ij - mean(score)) / std(score)        mean and standard deviation of the matrix
    matrix k loses the fraction of its z that lie below t;   t such that the whole is met

The scores are the method's own, on the dense model. Which weights of a matrix leave the method decides as ever; only
how many do is decided here. Scores of a matrix are summed up as `points` quantiles: a model needs little memory.

Standardising makes matrices comparable, as in FLAP (Y. An et al., AAAI 2024, arXiv:2312.11983), which does it for
channels. Methods that have no score before they prune (SparseGPT) can't follow.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from secateur.allocate import fit_sparsities
from secateur.allocators.base import Allocator, BlockWeights, Part, Wishes, sizes_of
from secateur.allocators.registry import allocator
from secateur.errors import UsageError
from secateur.methods import WeightMethod, option
from secateur.observe import Statistic


@allocator("global")
@dataclass(frozen=True, kw_only=True)
class Global(Allocator):
    """Options of the standardised global threshold."""

    points: int = option(4096, "quantiles that the scores of a matrix are summed up as", ge=2)

    observes: ClassVar[str] = "inputs"
    measures: ClassVar[bool] = True

    def needed_statistics(self, method: WeightMethod) -> Mapping[str, type[Statistic]]:
        return method.needed_statistics()

    def check(self, method: WeightMethod) -> None:
        if type(method).score is WeightMethod.score:
            raise UsageError(
                f"{method.name} has no scores before it prunes, which allocator global compares: take another allocator"
                " ('secateur allocators' shows them all)"
            )

    def measure(self, block: BlockWeights, method: WeightMethod) -> Tensor:
        # none of a block that has lost both of its sub-layers
        rows = [torch.empty(0, self.points + 1, dtype=torch.float64)]
        for target in block.targets:
            scores = method.score(target, block.seen.get(target.name, {})).double().flatten()
            spread = scores.std(correction=0)
            ordered = ((scores - scores.mean()) / spread if spread > 0 else scores * 0).sort().values
            # positions between entries: the value at share p is the p-quantile
            places = torch.linspace(0, len(ordered) - 1, self.points + 1, dtype=torch.float64, device=ordered.device)
            below = places.long().clamp_max(len(ordered) - 1)
            above = (below + 1).clamp_max(len(ordered) - 1)
            rows.append(torch.lerp(ordered[below], ordered[above], places - below).cpu()[None])
        return torch.cat(rows)

    def sparsities(self, parts: Sequence[Part], measured: Sequence[Tensor], sparsity: float) -> Wishes:
        quantiles, sizes = torch.cat(list(measured)).numpy(), sizes_of(parts)
        shares = np.linspace(0.0, 1.0, quantiles.shape[1])

        def below(threshold: float) -> Wishes:
            return np.array([np.interp(threshold, row, shares) for row in quantiles])

        low, high = float(quantiles.min()), float(quantiles.max())
        while low < (middle := (low + high) / 2) < high:
            enough = np.average(below(middle), weights=sizes) >= sparsity
            low, high = (low, middle) if enough else (middle, high)
        return fit_sparsities(below(high), sizes, sparsity)
