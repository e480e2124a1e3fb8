"""Attention over a cache in which something was removed: what a query may see, and the reference over the mixed
store."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.cache.kernels import Problem, Rectangle, kernel_for
from secateur.cache.store import Store
from secateur.errors import UnsupportedModelError

# Shapes: B sequences, T new tokens, H query heads, K key-value heads, n rows of a segment, E head dimension.

SUPPORTED = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4")


@dataclass(frozen=True)
class Visible:
    """Which tokens of the text the new ones may see.

    ``mask`` is what transformers made for the whole text: None, [B, 1, T, text] bool or to be added, or [B, text] with
    zeros for padding. ``seen`` counts the text with the T ``new`` tokens.
    """

    mask: Tensor | None
    new: int
    seen: int

    def by_token(self) -> tuple[Tensor | None, bool]:
        """The mask [B or 1, T or 1, text] of every new token, and whether it sees nothing behind itself in any case."""
        if self.mask is None:
            return None, self.new > 1
        return (self.mask[:, 0], False) if self.mask.dim() == 4 else (self.mask.bool()[:, None], self.new > 1)

    def at(self, positions_BKn: Tensor, sequences: slice = slice(None)) -> Tensor | None:
        """The mask at rows of these positions, [B, K, T, n], bool or to be added; None when all of them are seen."""
        mask = self.mask
        if mask is not None and mask.dim() == 4:
            batch, heads = positions_BKn.shape[:2]
            chosen = mask[sequences] if mask.shape[0] > 1 else mask
            index = positions_BKn[:, :, None].expand(-1, -1, self.new, -1)
            return chosen.expand(batch, heads, self.new, mask.shape[-1]).gather(-1, index)
        seen = None
        if self.new > 1:
            own = torch.arange(self.seen - self.new, self.seen, device=positions_BKn.device)
            seen = positions_BKn[:, :, None] <= own[:, None]
        if mask is not None:
            real = mask.bool()[sequences, None].expand(-1, positions_BKn.shape[1], -1).gather(-1, positions_BKn)
            seen = real[:, :, None] if seen is None else seen & real[:, :, None]
        return seen

    def with_blank(self, positions_BKn: Tensor) -> tuple[Visible, Tensor]:
        """The same with a place behind the text that nothing sees, and ``positions_BKn`` with that place for -1."""
        batch, device = positions_BKn.shape[0], positions_BKn.device
        mask = self.at(torch.arange(self.seen, device=device).expand(batch, 1, -1))
        if mask is None:
            mask = torch.ones(batch, 1, self.new, self.seen, dtype=torch.bool, device=device)
        unseen = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        hidden = Visible(F.pad(mask, (0, 1), value=unseen), self.new, self.seen)
        return hidden, positions_BKn.masked_fill(positions_BKn < 0, self.seen)


def left_padding(mask: Tensor | None, batch: int, tokens: int) -> list[int] | None:
    """How many tokens of every sequence are padding on the left; None without any.

    Raises UnsupportedModelError where a prompt has holes or padding on its right.
    """
    if mask is None:
        return None
    last = mask[:, 0, -1] if mask.dim() == 4 else mask
    real = (
        last if last.dtype == torch.bool else last > torch.finfo(last.dtype).min / 2 if mask.dim() == 4 else last.bool()
    )
    real = real.expand(batch, -1)[:, :tokens]
    padding = tokens - real.sum(dim=-1)
    left = torch.arange(tokens, device=real.device) >= padding[:, None]
    if not torch.equal(left, real):
        raise UnsupportedModelError(
            "a cache that evicts tokens takes prompts that are padded on the left, and the attention mask of this one"
            " has zeros elsewhere: set tokenizer.padding_side = 'left'"
        )
    return padding.tolist() if bool(padding.any()) else None


def base_attention(module: nn.Module, name: str) -> Callable[..., Any]:
    """The function that the attention module would have called. Raises UnsupportedModelError."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if name not in SUPPORTED or (name == "eager" and eager is None):
        raise UnsupportedModelError(
            f"a compressed cache works with the attention implementations {', '.join(SUPPORTED)}, and this model uses"
            f" '{name}': load it with attn_implementation='sdpa'"
        )
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)  # type: ignore[arg-type]


def mixed_attention(
    query_BHTE: Tensor,
    store: Store | None,
    tail: tuple[Tensor, Tensor],
    tail_positions_BKn: Tensor,
    visible: Visible,
    scaling: float,
    softcap: float | None = None,
) -> Tensor:
    """softmax(scaling * q.k) v over the rows of ``store`` and the dense ones behind them, [B, T, H, E].

    Query heads share the key-value heads in runs of H / K. A kernel computes it where there is one.
    """
    rectangle = Rectangle(tail[0].contiguous(), tail[1].contiguous(), tail_positions_BKn)
    parts = (rectangle,) if store is None else (store, rectangle)
    problem = Problem(query_BHTE, parts, *visible.by_token(), visible.seen, scaling, softcap)
    kernel = kernel_for(problem)
    if kernel is not None:
        return kernel(problem)
    return reference_attention(query_BHTE, store, tail, tail_positions_BKn, visible, scaling, softcap)


def reference_attention(
    query_BHTE: Tensor,
    store: Store | None,
    tail: tuple[Tensor, Tensor],
    tail_positions_BKn: Tensor,
    visible: Visible,
    scaling: float,
    softcap: float | None = None,
) -> Tensor:
    """What ``mixed_attention`` gives, in plain torch: softmax in float32, everything else in the model's dtype.

    Nothing but the rows of one span is ever made dense.
    """
    batch, heads, new, width = query_BHTE.shape
    keys, values = tail
    grouped = query_BHTE.reshape(batch, keys.shape[1], -1, width)
    out = torch.empty(*grouped.shape[:-1], values.shape[-1], dtype=query_BHTE.dtype, device=query_BHTE.device)
    everything = (None, slice(None), slice(None))
    for span, b, k in [everything] if store is None else store.spans():
        queries, positions = grouped[b, k], tail_positions_BKn[b, k]
        logits = queries @ keys[b, k].mT
        if store is not None and span is not None:
            positions = torch.cat([store.text_positions(span), positions], dim=-1)
            logits = torch.cat([store.keys.logits(queries, span), logits], dim=-1)
        logits = logits * scaling
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        logits = _masked(logits, visible.at(positions, b), new)
        weights = logits.softmax(dim=-1, dtype=torch.float32).to(query_BHTE.dtype)
        old = positions.shape[-1] - keys.shape[2]
        mixed = weights[..., old:] @ values[b, k]
        if store is not None and span is not None:
            mixed = mixed + store.values.mix(weights[..., :old], span)
        out[b, k] = mixed
    return out.view(batch, heads, new, -1).transpose(1, 2)


def _masked(logits: Tensor, mask: Tensor | None, new: int) -> Tensor:
    if mask is None:
        return logits
    by_token = logits.unflatten(2, (-1, new))
    mask = mask[:, :, None]
    if mask.dtype == torch.bool:
        return by_token.masked_fill(~mask, torch.finfo(logits.dtype).min).flatten(2, 3)
    return (by_token + mask).flatten(2, 3)
