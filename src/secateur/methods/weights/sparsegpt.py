"""SparseGPT: prune a matrix column by column and let the remaining columns absorb each error.

    H    = (2/n) * sum over the n calibration sequences of X^T X,   H_jj += damping * mean(diag H)
    H^-1 = U^T U,   U upper triangular
    score_ij = W_ij^2 / U_jj^2                                       (eq. 4)
    for every column j, left to right:  e = (w_j - q_j) / U_jj;  W[:, j+1:] -= e outer U[j, j+1:]

q_j is w_j with the masked entries zeroed. The mask of 128 columns is chosen at once, all rows competing; an N:M
pattern is chosen for M columns at a time on the weights as updated so far. Blocks are calibrated in sequence.

Source: E. Frantar and D. Alistarh, "SparseGPT", ICML 2023, arXiv:2301.00774; official code IST-DASLab/sparsegpt.
Differs from the official code: exactly floor(entries * sparsity) of a column block leave (theirs: `<=` a threshold,
one more; option `inclusive`); a Hessian that can't be factorised is damped further, tenfold at a time, and the plan
says so (theirs: fails); inputs that are never active have no part in the mean (theirs: each counts as 1, however quiet
the others are).
"""

from dataclasses import dataclass
from math import gcd
from typing import ClassVar

from torch import Tensor

from secateur.allocate import MaskRule, PerMatrix, parse_pattern
from secateur.errors import OptionError
from secateur.methods import Descriptor, Seen, Target, WeightMethod, option, register
from secateur.observe import Gram
from secateur.solver import damping_notes, inverse_factor, obs_sweep, sweep_flops


@register("sparsegpt")
@dataclass(frozen=True, kw_only=True)
class SparseGPT(WeightMethod):
    """Options of SparseGPT; defaults from the official code."""

    block_size: int = option(128, "columns whose mask is chosen at once", unit="columns", ge=1)
    damping: float = option(0.01, "added to the diagonal of H, relative to its mean", ge=0)
    inclusive: bool = option(False, "the published rule, which also removes the entry at the threshold and all ties")

    statistics: ClassVar = {"gram": Gram}
    sequential: ClassVar[bool] = True
    sweeps: ClassVar[bool] = True
    descriptor: ClassVar = Descriptor(
        object="weights",
        granularity="element",
        score="second_order",
        allocation="uniform",
        recovery="least_squares",
        data="unlabelled_calibration",
        speedup="memory_only",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.inclusive and self.pattern:
            raise OptionError(
                "sparsegpt: inclusive is a rule for a threshold, which a pattern has none of: leave pattern out"
            )

    def rule(self) -> MaskRule:
        return parse_pattern(self.pattern) if self.pattern else PerMatrix(self.sparsity, self.inclusive)

    def step(self, shape: tuple[int, int]) -> int:
        # every column block loses its share of what the matrix does, so that share must be whole
        return shape[1] // gcd(min(self.block_size, shape[1]), shape[1])

    def prune(self, target: Target, seen: Seen) -> tuple[Tensor, Tensor | None, tuple[str, ...]]:
        rule = self.rule()
        group = parse_pattern(self.pattern).m if self.pattern else None
        block = self.block_size if group is None else -(-self.block_size // group) * group
        factor, used = seen["gram"].cached("factor", self.damping, self._factor)
        weight = target.weight.to(factor.dtype)
        dead = seen["gram"].dead
        if bool(dead.any()):
            weight = weight.masked_fill(dead, 0)
        weight, keep, _ = obs_sweep(weight, factor, rule.keep, block=block, group=group)
        return keep, weight, damping_notes(target.name, self.damping, used)

    def solve_flops(self, outputs: int, inputs: int) -> int:
        return sweep_flops(outputs, inputs)

    def _factor(self, gram: Gram) -> tuple[Tensor, float]:
        return inverse_factor(gram.total_CC.mul_(2.0 / gram.sequences), self.damping)
