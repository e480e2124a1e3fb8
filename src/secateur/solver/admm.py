"""ADMM on one weight: alternate between the least-squares solution and its projection onto what may stay.

    W' <- Q (G + rho (Z - U)),  Q = (H + rho I)^-1;   Z = mask * (W' + U);   U <- U + W' - Z

all in inputs scaled to a unit diagonal. The mask is chosen anew on W' + U for the first steps and stays then. With a
fixed mask this converges to the refit of ``masked``. O outputs, I inputs.

Source: V. Boza, "Fast and Effective Weight Update for Pruned Large Language Models", TMLR 2024, arXiv:2401.02938.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from secateur.solver.problem import Problem

Choose = Callable[[Tensor, int], Tensor]
"""(scores [outputs, inputs], number of the step from 0) → keep, bool of the same shape."""


def admm(
    problem: Problem, choose: Choose, *, steps: int = 20, mask_steps: int = 15, rho: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(weight [outputs, inputs], keep mask) after ``steps``; ``choose`` is asked in the first ``mask_steps`` of them.

    It ranks |W' + U| in scaled inputs, which is |W_ij| times the norm of input j in the first step.
    """
    inverse_II = problem.curvature.inverse(rho)
    w_OI, u_OI = problem.start_OI.clone(), torch.zeros_like(problem.start_OI)
    keep_OI = torch.ones_like(w_OI, dtype=torch.bool)
    for step in range(steps):
        sum_OI = w_OI + u_OI
        if step < mask_steps:
            keep_OI = choose(sum_OI.abs(), step)
        z_OI = sum_OI * keep_OI
        u_OI = sum_OI - z_OI
        w_OI = (problem.g_OI + rho * (z_OI - u_OI)) @ inverse_II
    return problem.unscaled((w_OI + u_OI) * keep_OI), keep_OI


def admm_flops(outputs: int, inputs: int, steps: int) -> int:
    """Operations: one inverse, and a product for G and for every step."""
    return 2 * inputs**3 + 2 * (steps + 1) * outputs * inputs * inputs
