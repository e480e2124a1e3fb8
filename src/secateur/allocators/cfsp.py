"""CFSP: the coarse stage of CFSP, blocks that turn the residual stream stay denser.

    a_l    = mean over tokens of arccos(cos(h_l, h_{l+1})) / pi        h_l enters block l, h_{l+1} leaves it
    w_l    = sigmoid(alpha * 13.1072 * (a_l - mean a))
    keep_l = w_l / mean(w) * (1 - sparsity)

13.1072 is 128 sequences * 1024 tokens / 10^4: the published code sums over its calibration tokens and divides by 10^4,
and would give every block the same for fewer. Where a keep reaches 1, w is drawn towards its mean, until the largest
is (1 - s) + s / 1.05. All matrices of a block get the same sparsity. Other metrics: `cosine` 1 - cos, `mse` mean over
channels of (h_l - h_{l+1})^2, `mae` mean over channels of |h_l - h_{l+1}|; the published `uniform` is the allocator of
that name.

Source: "CFSP: An Efficient Structured Pruning Framework for LLMs with Coarse-to-Fine Activation
Information", COLING 2025, arXiv:2409.13199; official code wyxscir/CFSP, which gives FFN channels their share this way.
Differs from it: the mean angle instead of the sum; means are weighted by the sizes of the blocks; cosines are clamped
to [-1, 1] before the arc cosine (theirs: NaN).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from secateur.allocate import fit_sparsities
from secateur.allocators.base import Allocator, BlockWeights, Part, Wishes, of_blocks, sizes_of
from secateur.allocators.registry import allocator
from secateur.methods import option
from secateur.observe import Angle, Change, Similarity, Statistic

# tokens of the published calibration set over the constant that the published code divides by
_SCALE = 128 * 1024 / 1e4
# how far below 1 the official code leaves the largest keep
_MARGIN = 1.05


class HalfSimilarity(Similarity):
    """With 0.5 for a cosine that is not a number, as the official code has it."""

    nothing: ClassVar[float] = 0.5


# metric → name of what is observed of a block, its class, and the importance
_METRICS: dict[str, tuple[str, type[Statistic], Callable[[Any], float]]] = {
    "angular": ("angle", Angle, lambda seen: seen.mean),
    "cosine": ("similarity", HalfSimilarity, lambda seen: 1.0 - seen.mean),
    "mse": ("change", Change, lambda seen: seen.square),
    "mae": ("change", Change, lambda seen: seen.absolute),
}


@allocator("cfsp")
@dataclass(frozen=True, kw_only=True)
class CFSP(Allocator):
    """Options of CFSP's coarse stage; defaults are those of the official code."""

    metric: str = option("angular", "how far a block moves the residual stream", choices=tuple(_METRICS))
    alpha: float = option(1.0, "how sharply the keep follows the angle; 0 is uniform")

    observes: ClassVar[str] = "blocks"
    measures: ClassVar[bool] = True
    shares: ClassVar[bool] = True

    def needed_statistics(self, method: Any) -> Mapping[str, type[Statistic]]:
        name, statistic, _ = _METRICS[self.metric]
        return {name: statistic}

    def measure(self, block: BlockWeights, method: Any) -> Tensor:
        name, _, importance = _METRICS[self.metric]
        return torch.tensor(importance(block.seen[""][name]), dtype=torch.float64)

    def sparsities(self, parts: Sequence[Part], measured: Sequence[Tensor], sparsity: float) -> Wishes:
        sizes = sizes_of(parts)
        angles = of_blocks(parts, [float(angle) for angle in measured])
        z = _SCALE * (angles - np.average(angles, weights=sizes))
        w = 1.0 / (1.0 + np.exp(-self.alpha * z))
        mean, keep = np.average(w, weights=sizes), 1.0 - sparsity
        if w.max() / mean * keep >= 1:
            w = mean + (w - mean) * mean * (1 / keep - 1) / (w.max() - mean) / _MARGIN
        return fit_sparsities(1.0 - w / mean * keep, sizes, sparsity)
