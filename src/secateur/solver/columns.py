"""Whole columns at once (OBSPA): all columns that stay are refitted together, which is the least-squares optimum.

O outputs, I inputs, U units, W columns of one unit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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
        if width:
            index_UW = torch.stack([columns[unit] for unit in units]).to(w_OI.device)
            losses_U[units] = losses_of_groups(w_OI, inverse_II, index_UW)
    return losses_U


def losses_of_groups(w_OI: Tensor, inverse_II: Tensor, columns_UW: Tensor) -> Tensor:
    """``removal_losses`` of units with as many columns each, [units, width] int64."""
    if columns_UW.shape[1] == 1:
        columns_U = columns_UW[:, 0]
        return 0.5 * w_OI[:, columns_U].square().sum(dim=0) / inverse_II[columns_U, columns_U]
    lower_UWW = torch.linalg.cholesky(inverse_II[columns_UW[:, :, None], columns_UW[:, None, :]])
    w_UWO = w_OI.T[columns_UW]
    return 0.5 * (w_UWO * torch.cholesky_solve(w_UWO, lower_UWW)).sum(dim=(1, 2))


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
