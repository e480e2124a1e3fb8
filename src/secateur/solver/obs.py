"""The optimal brain surgeon, exactly: one weight after the other leaves its row, and the inverse Hessian follows.

    loss of removing p    1/2 * w_p^2 / [H^-1]_pp
    update                w <- w - w_p / [H^-1]_pp * [H^-1]_:,p
    downdate              H^-1 <- H^-1 - [H^-1]_:,p [H^-1]_p,: / [H^-1]_pp

Every row has an inverse of its own, which shrinks with the row. O outputs, I inputs, R rows of a chunk, A inputs that
are alive in each of them.

Source: B. Hassibi and D. Stork 1993; E. Frantar et al., "Optimal Brain Compression", NeurIPS 2022, arXiv:2208.11580.
"""

from __future__ import annotations

import torch
from torch import Tensor

# bytes of the inverses of the rows that are worked on together
_CHUNK_BYTES = 1 << 28
# rows and columns of removed weights are dropped when this share of what is there is left
_SHRINK = 0.8


def downdated(inverse_II: Tensor, p: int) -> Tensor:
    """H^-1 once input ``p`` has left; its row and column are zero."""
    smaller_II = inverse_II - torch.outer(inverse_II[:, p], inverse_II[p]) / inverse_II[p, p]
    smaller_II[p], smaller_II[:, p] = 0, 0
    return smaller_II


def greedy(w_OI: Tensor, inverse_II: Tensor, *, group: int = 0, most: int = 0) -> tuple[Tensor, Tensor]:
    """(order [outputs, removals] int64, losses [outputs, removals]): the inputs that leave every row, one by one.

    All inputs leave; with ``group`` at most ``most`` in every run of ``group`` consecutive ones. Both tensors are
    float64, which is what keeps the downdates exact.
    """
    removals = w_OI.shape[1] // group * most if group else w_OI.shape[1]
    rows = max(1, _CHUNK_BYTES // (8 * inverse_II.numel()))
    parts = [_greedy_rows(w, inverse_II, removals, group, most) for w in w_OI.split(rows)]
    return torch.cat([order for order, _ in parts]), torch.cat([losses for _, losses in parts])


def _greedy_rows(w_RI: Tensor, inverse_II: Tensor, removals: int, group: int, most: int) -> tuple[Tensor, Tensor]:
    rows, inputs = w_RI.shape
    w_RA, inverse_RAA = w_RI.clone(), inverse_II.repeat(rows, 1, 1)
    alive_RA = torch.ones(rows, inputs, dtype=torch.bool, device=w_RI.device)
    names_RA = torch.arange(inputs, device=w_RI.device).repeat(rows, 1)
    order = torch.empty(rows, removals, dtype=torch.int64, device=w_RI.device)
    losses = w_RI.new_empty(rows, removals)
    gone_RG = torch.zeros(rows, inputs // group if group else 1, dtype=torch.int64, device=w_RI.device)
    every = torch.arange(rows, device=w_RI.device)
    for count in range(removals):
        diagonal_RA = inverse_RAA.diagonal(dim1=1, dim2=2)
        cost_RA = w_RA.square() / diagonal_RA
        closed_RA = ~alive_RA
        if group:
            closed_RA = closed_RA | (gone_RG >= most).gather(1, names_RA // group)
        cost_RA = cost_RA.masked_fill(closed_RA, torch.inf)
        loss_R, p_R = cost_RA.min(dim=1)
        order[:, count], losses[:, count] = names_RA[every, p_R], loss_R / 2
        pivot_R = diagonal_RA[every, p_R]
        column_RA = inverse_RAA[every, p_R].clone()
        w_RA -= (w_RA[every, p_R] / pivot_R)[:, None] * column_RA
        inverse_RAA.baddbmm_((column_RA / pivot_R[:, None])[:, :, None], column_RA[:, None, :], alpha=-1)
        alive_RA[every, p_R] = False
        # what has left is never a pivot again, and has no part in what is left
        inverse_RAA[every, p_R], inverse_RAA[every, :, p_R] = 0, 0
        inverse_RAA[every, p_R, p_R] = 1
        w_RA[every, p_R] = 0
        if group:
            gone_RG.scatter_add_(1, (order[:, count] // group)[:, None], torch.ones_like(order[:, :1]))
        left = inputs - count - 1
        if 0 < left <= _SHRINK * w_RA.shape[1]:
            index_RL = alive_RA.nonzero()[:, 1].reshape(rows, left)
            w_RA, names_RA = w_RA.gather(1, index_RL), names_RA.gather(1, index_RL)
            inverse_RAA = inverse_RAA[every[:, None, None], index_RL[:, :, None], index_RL[:, None, :]]
            alive_RA = torch.ones_like(w_RA, dtype=torch.bool)
    return order, losses


def spread(order: Tensor, losses: Tensor, count: int, inputs: int) -> Tensor:
    """Keep mask [outputs, inputs]: the ``count`` smallest losses of all rows say how many inputs every row loses.

    Losses are taken as they are: that of a later step may be smaller than that of the one before it.
    """
    keep_OI = torch.ones(len(order), inputs, dtype=torch.bool, device=order.device)
    if not count:
        return keep_OI
    taken = losses.flatten().argsort(stable=True)[:count] // losses.shape[1]
    many_O = torch.bincount(taken, minlength=len(order))
    leaves = torch.arange(losses.shape[1], device=order.device) < many_O[:, None]
    rows, places = leaves.nonzero(as_tuple=True)
    keep_OI[rows, order[rows, places]] = False
    return keep_OI


def greedy_bytes(outputs: int, inputs: int) -> int:
    """Bytes: the inverses of the rows of a chunk, and as much again while they shrink; order and losses of all rows."""
    return 2 * max(_CHUNK_BYTES, 8 * inputs * inputs) + 2 * 8 * outputs * inputs


def greedy_flops(outputs: int, inputs: int) -> int:
    """Operations of the downdates of all rows, which shrink from all inputs to none."""
    return outputs * 2 * inputs**3 // 2
