"""ADMM on one weight: alternate between the least-squares solution and its projection onto what may stay.

    W' <- Q (G + rho (Z - U)),  Q = (H + rho I)^-1;   Z = mask * (W' + U);   U <- U + W' - Z

all in inputs scaled to a unit diagonal. The mask is chosen anew on W' + U for the first steps and stays then. With a
fixed mask this converges to the refit of ``masked``. O outputs, I inputs.

Source: V. Boza, "Fast and Effective Weight Update for Pruned Large Language Models", TMLR 2024, arXiv:2401.02938.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from secateur.solver.problem import Problem
from secateur.solver.splitting import Splitting

Choose = Callable[[Tensor, int], Tensor]
"""(scores [outputs, inputs], number of the step from 0) → keep, bool of the same shape."""


def admm(
    problem: Problem, choose: Choose, *, steps: int = 20, mask_steps: int = 15, rho: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(weight [outputs, inputs], keep mask) after ``steps``; ``choose`` is asked in the first ``mask_steps`` of them.

    It ranks |W' + U| in scaled inputs, which is |W_ij| times the norm of input j in the first step.
    """
    splitting = Splitting(problem)
    for step in range(steps):
        if step < mask_steps:
            splitting.project(lambda scores, step=step: choose(scores, step))
        splitting.solve(rho)
    return problem.unscaled(splitting.sum_OI * splitting.keep_OI), splitting.keep_OI


def admm_flops(outputs: int, inputs: int, steps: int) -> int:
    """Operations: one inverse, and a product for G and for every step."""
    return 2 * inputs**3 + 2 * (steps + 1) * outputs * inputs * inputs
