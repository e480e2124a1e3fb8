"""Wanda: weights times the norm of their input activations.

A small weight on a loud input matters more than a larger one on a silent input.

    a_j      = (1/n) * sum over the n calibration sequences of ||X_j||_2^2
    score_ij = |W_ij| * sqrt(a_j)                                            (eq. 1)

Every output row loses its floor(inputs * sparsity) lowest entries; N:M works within rows. No weight update. Blocks
are calibrated in sequence: a block sees what the pruned blocks before it give, and all its matrices are pruned from
one pass. Embeddings and head stay.

Variant (`use_variant`): per row, the lowest entries whose cumulative score stays below alpha times the row's sum
leave; alpha is found by bisection so that the matrix reaches the sparsity.

Source: M. Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024,
arXiv:2306.11695; official code locuslab/wanda.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.allocate import MaskRule, mask_rule
from secateur.criteria import weighted_magnitude
from secateur.errors import OptionError
from secateur.methods import Descriptor, Seen, Target, WeightMethod, option, register
from secateur.observe import SumSquares


@register("wanda")
@dataclass(frozen=True, kw_only=True)
class Wanda(WeightMethod):
    """Options of Wanda; defaults from the official code."""

    scope: str = option("row", "who competes: one output row, one matrix, or all", choices=("row", "layer", "global"))
    use_variant: bool = option(False, "choose the number of weights per row by cumulative score (appendix)")

    statistics: ClassVar = {"squares": SumSquares}
    sequential: ClassVar[bool] = True
    descriptor: ClassVar = Descriptor(
        object="weights",
        granularity="element",
        score="activation",
        allocation="uniform",
        data="unlabelled_calibration",
        speedup="memory_only",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.use_variant and (self.pattern or self.scope != "row"):
            raise OptionError(
                "wanda: use_variant chooses how many weights every row loses: leave scope and pattern out"
            )

    def score(self, target: Target, seen: Seen) -> Tensor:
        square_sum_I = seen["squares"].mean_per_sequence().to(target.weight.device)
        return weighted_magnitude(target.weight, square_sum_I)

    def rule(self) -> MaskRule:
        if self.use_variant:
            return CumulativeRule(self.sparsity)
        return mask_rule(self.pattern, self.sparsity, self.scope)


@dataclass(frozen=True)
class CumulativeRule:
    """Rows lose entries while their cumulative score is at most alpha of the row's sum; alpha by bisection."""

    sparsity: float

    def keep(self, scores_OI: Tensor) -> Tensor:
        ordered, order = scores_OI.sort(dim=1, stable=True)
        share = ordered.double().cumsum(dim=1) / ordered.double().sum(dim=1, keepdim=True).clamp_min(1e-300)
        low, high, alpha = 0.0, 0.8, 0.4
        # bounds, start and tolerance of the official code
        while abs(float((share <= alpha).double().mean()) - self.sparsity) > 0.001 and high - low >= 0.001:
            low, high = (low, alpha) if float((share <= alpha).double().mean()) > self.sparsity else (alpha, high)
            alpha = (low + high) / 2
        return torch.ones_like(scores_OI, dtype=torch.bool).scatter_(1, order, share > alpha)
