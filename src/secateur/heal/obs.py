"""The optimal brain surgeon on a row-shared Hessian.

Swept left to right (SparseGPT, algorithm 1): for a given mask the sweep equals, for every column j from left to right,
zero the masked weights of column j and refit only the columns to the right of j by least squares. The lazy updates
between blocks are exact: the block size changes the mask, never the result for a mask.

Whole columns at once (OBSPA): all columns that stay are refitted together, which is the least-squares optimum.
O outputs, I inputs, B columns of one block, U units, W columns of one unit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from secateur.errors import NonFiniteError

BlockMask = Callable[[Tensor], Tensor]
"""Scores of some columns, [outputs, columns] → keep, bool of the same shape."""

_LADDER = (1.0, 10.0, 100.0, 1000.0)


def inverse_factor(h_II: Tensor, damping: float = 0.01) -> tuple[Tensor, float]:
    """(U, damping used): the upper Cholesky factor of the inverse of the damped Hessian, H^-1 = U^T U.

    ``damping`` is relative to the mean of the diagonal. When the factorisation fails the damping is raised tenfold,
    up to a thousandfold; never is another matrix used in its place. Inputs that were never active get a unit
    diagonal. Raises NonFiniteError when even the last rung fails.
    """
    return _of_damped(h_II, damping, _upper_inverse_factor)


def inverse_hessian(h_II: Tensor, damping: float = 0.01) -> tuple[Tensor, float]:
    """(H^-1, damping used) of the damped Hessian, with the rules of ``inverse_factor``."""
    return _of_damped(h_II, damping, _inverse)


def _of_damped(h_II: Tensor, damping: float, solve: Callable[[Tensor], Tensor | None]) -> tuple[Tensor, float]:
    h_II = h_II.clone()
    diagonal = h_II.diagonal()
    if not bool(torch.isfinite(h_II).all()):
        raise NonFiniteError("the Hessian holds NaN or inf: the calibration activations overflow, try --dtype float32")
    dead = diagonal == 0
    diagonal[dead] = 1.0
    mean = diagonal.mean()
    for rung in _LADDER:
        tried = damping * rung if damping else (0.0 if rung == 1.0 else 1e-4 * rung)
        damped = h_II + torch.diag_embed((tried * mean).expand_as(diagonal))
        found = solve(damped)
        if found is not None:
            return found, tried
    raise NonFiniteError(f"the Hessian stays singular at a damping of {tried:g}: use more calibration data")


def _inverse(h_II: Tensor) -> Tensor | None:
    lower, failed = torch.linalg.cholesky_ex(h_II)
    if int(failed):
        return None
    inverse = torch.cholesky_inverse(lower)
    return inverse if bool(torch.isfinite(inverse).all()) else None


def _upper_inverse_factor(h_II: Tensor) -> Tensor | None:
    inverse = _inverse(h_II)
    if inverse is None:
        return None
    upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
    return upper if not int(failed) and bool(torch.isfinite(upper).all()) else None


def removal_losses(w_OI: Tensor, inverse_II: Tensor, columns: Sequence[Tensor]) -> Tensor:
    """What the squared error of the outputs grows by when the columns of one unit leave and all others are refitted.

        1/2 * sum over the outputs r of  W[r,S] ([H^-1]_SS)^-1 W[r,S]^T

    which is exact for H = 2 X^T X without damping. ``inverse_II`` is H^-1, ``columns`` holds the columns S of every
    unit, int64, possibly none. Returns [units], in the dtype of the weight, which should be float64.
    """
    losses_U = w_OI.new_zeros(len(columns))
    widths: dict[int, list[int]] = {}
    for unit, mine in enumerate(columns):
        widths.setdefault(len(mine), []).append(unit)
    for width, units in widths.items():
        if not width:
            continue
        index_UW = torch.stack([columns[unit] for unit in units]).to(w_OI.device)
        lower_UWW = torch.linalg.cholesky(inverse_II[index_UW[:, :, None], index_UW[:, None, :]])
        w_UWO = w_OI.T[index_UW]
        losses_U[units] = 0.5 * (w_UWO * torch.cholesky_solve(w_UWO, lower_UWW)).sum(dim=(1, 2))
    return losses_U


def refit_without(w_OI: Tensor, inverse_II: Tensor, gone_I: Tensor) -> Tensor:
    """The weight with zeros in the columns ``gone_I`` (bool) and all other columns refitted by least squares.

    W - W[:,S] ([H^-1]_SS)^-1 [H^-1]_S,:
    """
    gone = gone_I.nonzero().flatten()
    if not len(gone):
        return w_OI.clone()
    lower_SS = torch.linalg.cholesky(inverse_II[gone][:, gone])
    refitted_OI = w_OI - w_OI[:, gone] @ torch.cholesky_solve(inverse_II[gone], lower_SS)
    return refitted_OI.index_fill_(1, gone, 0)


def sweep_flops(outputs: int, inputs: int, block: int = 128) -> int:
    """Operations of the products in ``obs_sweep``, from every block of columns to those on its right."""
    return outputs * inputs * max(inputs - block, 0)


def obs_sweep(
    w_OI: Tensor, u_II: Tensor, choose: BlockMask, *, block: int = 128, group: int | None = None
) -> tuple[Tensor, Tensor, float]:
    """(weight, keep mask, loss): prune and compensate ``w_OI`` with the factor ``u_II`` of ``inverse_factor``.

    ``choose`` sees W^2 / U_jj^2. It decides ``block`` columns at once, or with ``group`` (N:M) ``group`` columns at a
    time on the weights as updated so far. The loss is half the sum of (w - q)^2 / U_jj^2 over pruned entries.
    """
    w_OI = w_OI.clone()
    outputs, inputs = w_OI.shape
    keep = torch.ones(outputs, inputs, dtype=torch.bool, device=w_OI.device)
    loss = 0.0
    for start in range(0, inputs, block):
        stop = min(start + block, inputs)
        u_BB = u_II[start:stop, start:stop]
        diagonal = u_BB.diagonal()
        # columns are rows of the transposed copy, so that every step touches contiguous memory
        w_BO = w_OI[:, start:stop].T.contiguous()
        error_BO = torch.empty_like(w_BO)
        keep_BO = torch.empty(w_BO.shape, dtype=torch.bool, device=w_OI.device)
        width = group or stop - start
        for left in range(0, stop - start, width):
            part = slice(left, left + width)
            scores = (w_BO[part] / diagonal[part, None]).square()
            keep_BO[part] = choose(scores.T).T
            for j in range(left, min(left + width, stop - start)):
                w_O = w_BO[j]
                error_O = w_O.masked_fill(keep_BO[j], 0).div_(diagonal[j])
                error_BO[j] = error_O
                w_BO[j + 1 :].addr_(u_BB[j, j + 1 :], error_O, alpha=-1)
        w_OI[:, start:stop] = w_BO.masked_fill(~keep_BO, 0).T
        keep[:, start:stop] = keep_BO.T
        loss += 0.5 * float(error_BO.double().square().sum())
        w_OI[:, stop:].addmm_(error_BO.T, u_II[start:stop, stop:], alpha=-1)
    return w_OI, keep, loss
