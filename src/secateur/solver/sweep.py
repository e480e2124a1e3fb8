"""The optimal brain surgeon on a row-shared Hessian, swept left to right (SparseGPT, algorithm 1).

For a given mask the sweep equals, for every column j from left to right, zero the masked weights of column j and refit
only the columns to the right of j by least squares. The lazy updates between blocks are exact: the block size changes
the mask, never the result for a mask. O outputs, I inputs, B columns of one block.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

BlockMask = Callable[[Tensor], Tensor]
"""Scores of some columns, [outputs, columns] → keep, bool of the same shape."""


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
            # what a column loses, as a multiple of it
            lost_BO = (~keep_BO[part]).to(w_BO.dtype).div_(diagonal[part, None])
            for j in range(left, min(left + width, stop - start)):
                error_O = torch.mul(w_BO[j], lost_BO[j - left], out=error_BO[j])
                w_BO[j + 1 :].addr_(u_BB[j, j + 1 :], error_O, alpha=-1)
        w_OI[:, start:stop] = w_BO.masked_fill(~keep_BO, 0).T
        keep[:, start:stop] = keep_BO.T
        loss += 0.5 * float(error_BO.double().square().sum())
        w_OI[:, stop:].addmm_(error_BO.T, u_II[start:stop, stop:], alpha=-1)
    return w_OI, keep, loss
