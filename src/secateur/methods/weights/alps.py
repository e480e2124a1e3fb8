"""ALPS: ADMM with a penalty that grows while the support settles, then least squares on the support.

    H = X^T X + damping * mean(diag) I, scaled to a unit diagonal like W;   G = W H;   D = largest k entries of W, V = 0
    repeat:  B = (G - V + rho D) (H + rho I)^-1;   D = largest k of B + V / rho;   V = V + rho (B - D)
    every three steps, s = entries of the support that have changed since the last check:
        s > k/10: rho * 1.3;   s > k/200: rho * 1.2;   s >= 1: rho * 1.1;   s = 0: stop
    the support is that of the largest k entries of B; `refit_steps` conjugate gradients solve for the weights on it

As long as neither of the first two rules has held, rho was too large: it is divided by five, and where s >= 1 all
begins again. After thirty steps a change of less than 0.03 % of the support is the end too. All weights of a matrix
compete; N:M works within rows. Blocks are calibrated in sequence. `target=dense` takes G from what the dense model
gives. `admm` is the cheaper cousin.

Source: X. Meng et al., "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models",
NeurIPS 2024, arXiv:2406.07831; official code mazumder-lab/ALPS. Differs from the official code: the conjugate gradients
stop by the residual on the support (theirs compare that of all entries, and always take ten steps); H + rho I is
inverted for every rho (theirs: by eigenvectors in float64, from which an inverse costs no less than without them);
what begins again is compared with the first support (theirs: with that of the try before).
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.allocate import MaskRule, mask_rule
from secateur.healing import problem_of
from secateur.methods import Descriptor, Seen, Target, WeightMethod, option, register
from secateur.observe import Gram
from secateur.solver import alps, alps_flops, cg_flops, refit


@register("alps")
@dataclass(frozen=True, kw_only=True)
class ALPS(WeightMethod):
    """Options of ALPS; defaults from the official code."""

    rho: float = option(0.1, "penalty to begin with; the Hessian has a unit diagonal", gt=0)
    steps: int = option(300, "iterations at most", unit="steps", ge=1)
    refit_steps: int = option(10, "steps of conjugate gradients on the support", unit="steps", ge=0)
    damping: float = option(0.01, "added to the diagonal of H, relative to its mean", ge=0)

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
        return mask_rule(self.pattern, self.sparsity, "layer")

    def prune(self, target: Target, seen: Seen) -> tuple[Tensor, Tensor | None, tuple[str, ...]]:
        problem, notes = problem_of(target.name, target.weight, seen, self.damping)
        weight, keep, steps = alps(problem.without_silent(), self.rule().keep, rho=self.rho, steps=self.steps)
        if self.refit_steps:
            weight = refit(problem, keep, weight, steps=self.refit_steps)
        if steps == self.steps:
            notes += (f"{target.name}: the support had not settled after {steps} steps",)
        return keep, weight, notes

    def solve_bytes(self, outputs: int, inputs: int) -> int:
        return 4 * inputs * (7 * outputs + 6 * inputs)

    def solve_flops(self, outputs: int, inputs: int) -> int:
        return alps_flops(outputs, inputs) + cg_flops(outputs, inputs, self.refit_steps)
