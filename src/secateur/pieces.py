"""Logits a few positions at a time: those of large vocabularies are the largest tensors there are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_ENTRIES = {"cpu": 1 << 18}
_ENTRIES_ELSEWHERE = 1 << 26
"""What the caches of a core hold several of in float32, or enough for a device to be busy."""


def by_rows(logits_NV: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of a few rows of ``logits_NV`` and of ``others``, [N, ...], together.

    What is made of the rows, such as copies in float32, stays in the cache of a processor and takes memory that was
    there already, instead of pages that the system has to clear first.
    """
    most = _ENTRIES.get(logits_NV.device.type, _ENTRIES_ELSEWHERE)
    rows = max(1, most // logits_NV.shape[-1])
    return zip(*(tensor.split(rows) for tensor in (logits_NV, *others)), strict=True)


def mean_loss(logits_NV: Tensor, loss: Callable[..., tuple[Tensor, Tensor]], *others: Tensor) -> Tensor:
    """Mean of a loss over rows of logits, which can be differentiated once, by the logits.

    ``loss`` takes a few rows of the logits and of ``others``, and gives the sum of their losses and the gradient of
    that. What is kept for the gradient is one tensor as large as the logits, instead of up to four.
    """
    found: Any = _ByRows.apply(logits_NV, loss, *others)
    return found


def cross_entropy(logits_NV: Tensor, wanted_N: Tensor) -> Tensor:
    """Mean of -log p(wanted) over rows, in nats; in float32, whatever the logits are. ``wanted_N`` int64."""
    return mean_loss(logits_NV, _surprise, wanted_N)


class _ByRows(torch.autograd.Function):
    """Mean of a loss over the rows of logits [N, V] and its gradient, in one pass."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, loss: Callable[..., tuple[Tensor, Tensor]], *others: Tensor) -> Tensor:
        gradient_NV = torch.empty_like(logits_NV)
        total = torch.zeros((), device=logits_NV.device)
        for logits, gradient, *beside in by_rows(logits_NV, gradient_NV, *others):
            value, slope = loss(logits, *beside)
            total += value
            gradient.copy_(slope)
        ctx.save_for_backward(gradient_NV)
        ctx.others = len(others)
        return total / len(logits_NV)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_NV,) = ctx.saved_tensors
        return gradient_NV * (upstream[0] / len(gradient_NV)), None, *[None] * ctx.others


def _surprise(logits_NV: Tensor, wanted_N: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of -log p(wanted), and p - 1 at what was wanted, p elsewhere."""
    mine, wanted_N1 = logits_NV.float().log_softmax(dim=-1), wanted_N[:, None]
    value = -mine.gather(-1, wanted_N1).sum()
    return value, mine.exp_().scatter_add_(-1, wanted_N1, mine.new_full((1, 1), -1.0).expand_as(wanted_N1))
