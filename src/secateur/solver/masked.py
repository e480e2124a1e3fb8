"""Refitting what a mask keeps: row by row the least-squares optimum on the kept inputs.

    w_K = (H_KK)^-1 G_K

Exactly where matrices are small; otherwise by conjugate gradients on all rows at once, in scaled inputs, with the mask
applied to the residual. Ten steps leave about 0.02 % of the loss above the optimum. O outputs, I inputs, R rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.solver.problem import Problem

STEPS = 10
RTOL = 1e-4
# up to so many inputs the exact solution costs no more than the steps
EXACT_INPUTS = 128
# entries of the matrices that are factorised together
_TOGETHER = 1 << 24


def refit(
    problem: Problem, keep_OI: Tensor, start_OI: Tensor | None = None, *, steps: int = STEPS, rtol: float = RTOL
) -> Tensor:
    """The weight [outputs, inputs] with zeros where ``keep_OI`` is False and everything else refitted.

    ``start_OI`` is where conjugate gradients begin, by default the dense weight. They stop when the residual of every
    row is below ``rtol`` times its right-hand side, or after ``steps``.
    """
    if keep_OI.shape[1] <= EXACT_INPUTS:
        return problem.unscaled(masked_exact(problem.h_II, problem.g_OI, keep_OI))
    start_OI = problem.scaled(problem.dense_OI if start_OI is None else start_OI)
    return problem.unscaled(masked_cg(problem.h_II, problem.g_OI, keep_OI, start_OI, steps=steps, rtol=rtol))


def masked_exact(h_II: Tensor, g_OI: Tensor, keep_OI: Tensor) -> Tensor:
    """The optimum of every row on its kept inputs, zeros elsewhere; one factorisation per row."""
    inputs = h_II.shape[0]
    rows = max(1, _TOGETHER // inputs**2)
    found = torch.empty_like(g_OI)
    for first in range(0, len(g_OI), rows):
        keep_RI = keep_OI[first : first + rows]
        # a removed input is one of its own, with nothing on the right-hand side
        h_RII = h_II * (keep_RI[:, :, None] & keep_RI[:, None, :])
        h_RII.diagonal(dim1=1, dim2=2).masked_fill_(~keep_RI, 1.0)
        g_RI = g_OI[first : first + rows] * keep_RI
        lower_RII = torch.linalg.cholesky(h_RII)
        found[first : first + rows] = torch.cholesky_solve(g_RI[:, :, None], lower_RII)[:, :, 0] * keep_RI
    return found


def masked_cg(
    h_II: Tensor, g_OI: Tensor, keep_OI: Tensor, start_OI: Tensor, *, steps: int = STEPS, rtol: float = RTOL
) -> Tensor:
    """Conjugate gradients for all rows at once; removed entries are zero at every step and the loss never grows."""
    w_OI = start_OI * keep_OI
    target_O = (g_OI * keep_OI).square().sum(dim=1).mul_(rtol**2)
    residual_OI = (g_OI - w_OI @ h_II) * keep_OI
    direction_OI = residual_OI.clone()
    square_O = residual_OI.square().sum(dim=1)
    for _ in range(steps):
        open_O = square_O > target_O
        if not bool(open_O.any()):
            break
        image_OI = (direction_OI @ h_II).mul_(keep_OI)
        curvature_O = (direction_OI * image_OI).sum(dim=1)
        step_O = torch.where(open_O, square_O / curvature_O.clamp_min(torch.finfo(h_II.dtype).tiny), 0.0)
        w_OI.addcmul_(step_O[:, None], direction_OI)
        residual_OI.addcmul_(step_O[:, None], image_OI, value=-1)
        before_O, square_O = square_O, residual_OI.square().sum(dim=1)
        ratio_O = torch.where(open_O, square_O / before_O.clamp_min(torch.finfo(h_II.dtype).tiny), 0.0)
        direction_OI.mul_(ratio_O[:, None]).add_(residual_OI)
    return w_OI


def cg_flops(outputs: int, inputs: int, steps: int = STEPS) -> int:
    """Operations of the products of ``masked_cg``, the first residual included."""
    return 2 * (steps + 1) * outputs * inputs * inputs


def refit_columns(problem: Problem, gone_I: Tensor) -> Tensor:
    """The weight [outputs, inputs] with zeros in the columns ``gone_I`` (bool) and all others refitted together."""
    kept = (~gone_I).nonzero().flatten()
    lower_KK = torch.linalg.cholesky(problem.h_II[kept][:, kept])
    scaled_OI = torch.zeros_like(problem.g_OI)
    scaled_OI[:, kept] = torch.cholesky_solve(problem.g_OI[:, kept].T, lower_KK).T
    return problem.unscaled(scaled_OI)


def refit_columns_flops(outputs: int, inputs: int) -> int:
    """Operations of ``refit_columns`` at most: factorisations of the whole and of what stays, and two solutions."""
    return 2 * inputs**3 // 3 + 4 * outputs * inputs * inputs
