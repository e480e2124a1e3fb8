"""Prompts as a cache method sees them, made of a few numbers."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from secateur.methods import Prompt, Rope


def prompt_of(
    keys: Tensor,
    values: Tensor | None = None,
    queries: Tensor | None = None,
    *,
    layer: int = 0,
    layers: int = 1,
    rope: Rope | None = None,
    reader: Tensor | None = None,
) -> Prompt:
    """One sequence: keys [K, S, E], values alike (ones), queries [H, S, E] (zeros), scaling 1/sqrt(E)."""
    return Prompt(
        layer=layer,
        layers=layers,
        keys=keys[None],
        values=torch.ones_like(keys)[None] if values is None else values[None],
        queries=torch.zeros_like(keys)[None] if queries is None else queries[None],
        positions=torch.arange(keys.shape[1])[None],
        scaling=keys.shape[-1] ** -0.5,
        rope=rope,
        reader=reader,
    )


def random_prompt(heads: int = 4, kv_heads: int = 2, tokens: int = 40, width: int = 8, seed: int = 0, **more) -> Prompt:
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(n, tokens, width, generator=generator) for n in (kv_heads, kv_heads, heads)]
    return prompt_of(*drawn, **more)


def kept(keep: Tensor) -> list[list[int]]:
    """Positions that stay, head by head, of the first sequence."""
    return [row.nonzero()[:, 0].tolist() for row in keep[0]]


class Words:
    """A tokenizer of one token per word, for models of 96 tokens."""

    chat_template: str | None = None
    bos_token_id: int | None = None

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": self.encode(text, add_special_tokens=add_special_tokens)}

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [sum(map(ord, word)) % 96 for word in re.findall(r"\s*\S+|\s+", text)]

    def apply_chat_template(self, chat, **arguments) -> str:
        return f"<user>{chat[0]['content']}</user><model>"
