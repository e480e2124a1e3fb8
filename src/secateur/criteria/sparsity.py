"""How sparse a vector is, as one number: the PQ index, and the bound on what can leave that follows from it.

    I_{p,q}(w) = 1 - d^(1/q - 1/p) * ||w||_p / ||w||_q                                     (definition 1)
               = 1 - (mean of |w|^p)^(1/p) / (mean of |w|^q)^(1/q),       0 < p < q
    r         >= d * (1 + eta)^(-q / (q - p)) * (1 - I)^(pq / (q - p))                     (theorem 1)

0 when all d entries have the same magnitude, 1 - d^(1/q - 1/p) when one alone isn't zero. It stays when a vector is
scaled or repeated, and falls when magnitudes come closer to each other. r is how many entries hold all but a fraction
eta of the sum of |w|^p.

Source: E. Diao et al., "Pruning deep neural networks from a sparsity perspective", ICLR 2023, arXiv:2302.05601;
official code dem123456789/Pruning-Deep-Neural-Networks-from-a-Sparsity-Perspective.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from secateur.errors import NonFiniteError, UsageError
from secateur.finite import all_finite


def pq_index(
    x: Tensor,
    p: float = 0.5,
    q: float = 1.0,
    *,
    dim: int | tuple[int, ...] | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """The PQ index of ``x``, float64 in [0, 1): how sparse it is; more equal magnitudes give less.

    ``x`` has any shape and dtype. With ``dim`` there is one index for every position of the other dimensions, of the
    entries along these, and otherwise one, [], of all. ``mask`` is boolean and shaped like ``x``: only entries where it
    is true are counted. What has no entries, or only zeros, has index 0.

    Raises UsageError unless 0 < p < q, and for a tensor without entries or a mask that doesn't fit; NonFiniteError for
    NaN and inf. Source: E. Diao et al., arXiv:2302.05601, definition 1.

        >>> pq_index(torch.tensor([0.0, 0.0, 0.0, 3.0]))
        tensor(0.7500, dtype=torch.float64)
    """
    check_orders(p, q)
    if x.numel() == 0:
        raise UsageError(f"the PQ index of a tensor of shape {list(x.shape)} isn't defined: it has no entries")
    if mask is not None and (mask.shape != x.shape or mask.dtype != torch.bool):
        raise UsageError(f"mask must be boolean of shape {list(x.shape)}, got {mask.dtype} of {list(mask.shape)}")
    sizes = x.detach().double().abs()
    live = torch.ones_like(sizes, dtype=torch.bool) if mask is None else mask
    sizes = sizes.masked_fill(~live, 0.0)
    if not all_finite(sizes):
        raise NonFiniteError("the PQ index needs finite numbers, and the tensor holds NaN or inf")
    along = tuple(range(x.dim())) if dim is None else dim
    count = live.sum(dim=along).double()
    # the index doesn't see the scale, and powers of tiny numbers would underflow
    sizes = sizes / sizes.amax(dim=along, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    means = [(sizes.pow(order).sum(dim=along) / count).pow(1.0 / order) for order in (p, q)]
    found = 1.0 - means[0] / means[1]
    # 0/0 without entries or without magnitudes; rounding where all are alike
    return torch.nan_to_num(found, nan=0.0).clamp_min(0.0)


def retained(index: Tensor, count: Tensor, p: float, q: float, eta: float = 0.0) -> Tensor:
    """The least number of entries that hold all but a fraction ``eta`` of the sum of |w|^p, float64, not rounded.

    ``index`` are PQ indices of vectors of ``count`` entries, of one shape. Source: arXiv:2302.05601, theorem 1.
    """
    check_orders(p, q)
    return count.double() * (1.0 + eta) ** (-q / (q - p)) * (1.0 - index.double()).pow(p * q / (q - p))


def check_orders(p: float, q: float) -> None:
    """Raises UsageError unless 0 < p < q."""
    if not (0 < p < q and math.isfinite(q)):
        raise UsageError(f"the PQ index needs 0 < p < q, got p={p:g} and q={q:g}")
