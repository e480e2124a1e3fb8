"""Attention probabilities as scores see them: in float32, causal, for the last queries of a prompt."""

from __future__ import annotations

import torch
from torch import Tensor


def causal_attention(queries_BHWE: Tensor, keys_BKSE: Tensor, scaling: float, softcap: float | None = None) -> Tensor:
    """softmax(scaling * q.k) of the last W queries over S keys, each over those that it may see, [B, H, W, S] float32.

    Query heads share the key-value heads in runs of H / K. With ``softcap`` c logits become c * tanh(logit / c).
    """
    batch, heads, window, width = queries_BHWE.shape
    kv_heads, tokens = keys_BKSE.shape[1:3]
    grouped = (queries_BHWE.float() * scaling).reshape(batch, kv_heads, -1, width)
    logits = (grouped @ keys_BKSE.float().mT).view(batch, heads, window, tokens)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    # only the last tokens can lie ahead of a query
    near = min(window, tokens)
    ahead = torch.ones(window, near, dtype=torch.bool, device=logits.device).triu(near - window + 1)
    logits[..., tokens - near :].masked_fill_(ahead, float("-inf"))
    return logits.softmax(dim=-1)


def per_kv_head(x_BHx: Tensor, kv_heads: int) -> Tensor:
    """Mean over the query heads of every key-value head: [B, H, ...] → [B, K, ...]."""
    return x_BHx.unflatten(1, (kv_heads, -1)).mean(dim=2)
