"""A slow model that decodes without any cache: the whole text at every step, and for every layer and head what each
token could see of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import AttentionInterface
from transformers.models.llama.modeling_llama import repeat_kv, rotate_half

Rule = Callable[[Any, Tensor], Tensor]
"""an attention module with its ``rows`` of attention [H, S, S] (zeros for what is hidden) and its ``inputs`` [S, D],
and what is there [K, S] bool → what stays of it"""


def slow(
    model: Any, ids: Tensor, steps: int, rule: Rule, *, turned: bool = False, every: int = 1, start: int = 0
) -> Tensor:
    """Greedy tokens [steps] behind ``ids`` [1, S]; ``rule`` is asked every few steps from step ``start`` on.

    ``turned`` gives what is left positions without gaps, at every step.
    """
    layers = model.config.num_hidden_layers
    there = torch.ones(layers, 2, 0, dtype=torch.bool)
    hidden: list[list[Tensor]] = [[] for _ in range(layers)]  # for every query, what it could see: [K, S]
    text = ids[0]

    def attend(module, query, key, value, mask, **arguments):
        layer, tokens = module.layer_idx, key.shape[2]
        seen = torch.stack([torch.nn.functional.pad(row, (0, tokens - row.shape[1])) for row in hidden[layer]], dim=1)
        logits = query @ repeat_kv(key, 2).mT * module.scaling
        if turned:
            logits = _without_gaps(model, query, key, seen) * module.scaling
        logits = logits.masked_fill(~seen.repeat_interleave(2, dim=0)[None], float("-inf"))
        weights = logits.softmax(dim=-1)
        module.rows = weights[0]
        return (weights @ repeat_kv(value, 2)).transpose(1, 2), None

    def note(module, args, kwargs):
        module.inputs = kwargs["hidden_states"][0]

    blocks = model.model.layers
    handles = [block.self_attn.register_forward_pre_hook(note, with_kwargs=True) for block in blocks]
    AttentionInterface.register("slow_reference", attend)
    before = model.config._attn_implementation
    model.config._attn_implementation_internal = "slow_reference"
    try:
        for step in range(steps):
            fresh = len(text) - there.shape[2]
            there = torch.cat([there, torch.ones(layers, 2, fresh, dtype=torch.bool)], dim=2)
            for layer in range(layers):
                for back in range(fresh, 0, -1):
                    hidden[layer].append(there[layer, :, : len(text) - back + 1])
            with torch.no_grad():
                logits = model(text[None], use_cache=False).logits
            if step >= start and step % every == 0:
                modules = [block.self_attn for block in blocks]
                there = torch.stack([rule(m, there[n]) for n, m in enumerate(modules)])
            text = torch.cat([text, logits[0, -1:].argmax(dim=-1)])
    finally:
        model.config._attn_implementation_internal = before
        for handle in handles:
            handle.remove()
    return text[ids.shape[1] :]


def _without_gaps(model: Any, query: Tensor, key: Tensor, seen: Tensor) -> Tensor:
    """Logits [1, H, S, S] of queries and keys at their places among what each query sees."""
    tokens = key.shape[2]
    cos, sin = model.model.rotary_emb(key, torch.arange(tokens)[None])
    plain_key, plain_query = (x * cos - rotate_half(x) * sin for x in (key, query))  # turned back
    place = seen.cumsum(dim=-1) - 1  # [K, S queries, S keys]
    logits = torch.zeros(1, query.shape[1], tokens, tokens)
    for q in range(tokens):
        for k in range(2):
            keys = _turn(model, plain_key[0, k], place[k, q])
            mine = slice(2 * k, 2 * k + 2)
            logits[0, mine, q] = _turn(model, plain_query[0, mine, q], place[k, q, q].expand(2)) @ keys.mT
    return logits


def _turn(model: Any, x: Tensor, positions: Tensor) -> Tensor:
    cos, sin = model.model.rotary_emb(x[None], positions[None])
    return x * cos[0] + rotate_half(x) * sin[0]
