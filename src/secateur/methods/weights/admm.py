"""ADMM: choose the mask and solve for the weights together, by alternating between least squares and projection.

    norm_j = sqrt(H_jj),  H = X^T X / (norm norm^T) + damping * I,  W = W * norm;   G = W H,  Q = (H + rho I)^-1,  U = 0
    repeat:  mask = largest entries of |W + U|   (first `mask_steps` times; the mask stays then)
             Z = mask * (W + U);   U = U + W - Z;   W = Q (G + rho (Z - U))
    the pruned weight is mask * (W + U) / norm

In the first step the mask is that of Wanda with all weights of a matrix competing. Blocks are calibrated in sequence.
`target=dense` takes G from what the dense model gives. `heal=refit` solves once more for the final mask, without the
damping of 0.1. Twenty products and one inverse: a whole plan takes up to a third longer than SparseGPT's.

Source: V. Boza, "Fast and Effective Weight Update for Pruned Large Language Models", TMLR 2024, arXiv:2401.02938;
official code fmfi-compbio/admm-pruning. Its default computes a cubic schedule of sparsities for the mask steps and
doesn't use it; `gradual` does. Differs from the official code: any N:M pattern (theirs: 2:4).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.allocate import MaskRule, mask_rule
from secateur.healing import problem_of
from secateur.methods import Descriptor, Seen, Target, WeightMethod, option, register
from secateur.observe import Gram
from secateur.solver import admm, admm_flops


@register("admm")
@dataclass(frozen=True, kw_only=True)
class ADMM(WeightMethod):
    """Options of ADMM; defaults from the official code."""

    steps: int = option(20, "iterations", unit="steps", ge=1)
    mask_steps: int = option(15, "iterations in which the mask is chosen anew", unit="steps", ge=1)
    rho: float = option(1.0, "penalty; the Hessian has a unit diagonal", gt=0)
    damping: float = option(0.1, "added to the unit diagonal of H", ge=0)
    gradual: bool = option(False, "reach the sparsity by a cubic schedule over the mask steps")
    scope: str = option("layer", "who competes: one matrix, or one output row", choices=("layer", "row"))

    statistics: ClassVar = {"gram": Gram}
    sequential: ClassVar[bool] = True
    fits: ClassVar[bool] = True
    costly: ClassVar[bool] = True
    descriptor: ClassVar = Descriptor(
        object="weights",
        granularity="element",
        score="second_order",
        allocation="uniform",
        recovery="least_squares",
        data="unlabelled_calibration",
        speedup="memory_only",
    )

    def rule(self) -> MaskRule:
        return mask_rule(self.pattern, self.sparsity, self.scope)

    def prune(self, target: Target, seen: Seen) -> tuple[Tensor, Tensor | None, tuple[str, ...]]:
        problem, notes = problem_of(target.name, target.weight, seen, self.damping, "unit")

        def choose(scores: Tensor, step: int) -> Tensor:
            return self._rule_at(step).keep(scores)

        weight, keep = admm(
            problem.without_silent(), choose, steps=self.steps, mask_steps=self.mask_steps, rho=self.rho
        )
        # what stays of inputs that were never active stays as it is
        weight = torch.where(keep & problem.curvature.silent_I, problem.dense_OI, weight)
        return keep, weight, notes

    def _rule_at(self, step: int) -> MaskRule:
        # a pattern has no sparsities between none and its own
        last = min(self.mask_steps, self.steps)
        if not self.gradual or self.pattern or step + 1 >= last:
            return self.rule()
        return mask_rule("", self.sparsity * (1 - (1 - (step + 1) / last) ** 3), self.scope)

    def solve_bytes(self, outputs: int, inputs: int) -> int:
        return 4 * inputs * (6 * outputs + 2 * inputs)

    def solve_flops(self, outputs: int, inputs: int) -> int:
        return admm_flops(outputs, inputs, self.steps)
