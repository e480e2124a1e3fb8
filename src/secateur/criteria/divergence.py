"""How far predictions are from those of another model."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

ROWS = 256
"""Positions whose logits are copied to float32 at a time."""


def kl_divergence(dense_BTV: Tensor, other_BTV: Tensor) -> float:
    """Mean over positions of KL(dense || other) in nats, from logits [sequences, length, vocabulary] of any dtype.

        KL = sum over tokens v of  p_v * (log p_v - log q_v)

    It is 0 where the predictions are the same, however the logits are shifted. Sums are float64, logs float32.
    """
    total = torch.zeros((), dtype=torch.float64, device=dense_BTV.device)
    rows, others = (logits.flatten(0, -2).split(ROWS) for logits in (dense_BTV, other_BTV))
    for mine_TV, theirs_TV in zip(rows, others, strict=True):
        log_p, log_q = log_softmax(mine_TV.float(), dim=-1), log_softmax(theirs_TV.float(), dim=-1)
        total += (log_p.exp() * (log_p - log_q)).sum(dim=-1).double().sum()
    return float(total) / dense_BTV[..., 0].numel()
