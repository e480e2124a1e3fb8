"""What every kernel is asked: queries, and the parts of a cache that they attend to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.cache.store import Store

# Shapes: B sequences, T new tokens, H query heads, K key-value heads, n rows, E head dimension.


@dataclass(frozen=True)
class Rectangle:
    """Dense ``keys`` and ``values`` [B, K, n, E], contiguous, with their ``positions`` in the text, [B, K, n] int64."""

    keys: Tensor
    values: Tensor
    positions: Tensor


@dataclass(frozen=True)
class Problem:
    """softmax(scaling * q.k) v of ``query`` [B, H, T, E] over all ``parts``; the T tokens are the last of ``seen``.

    ``mask`` [B or 1, T or 1, text], bool or to be added, says what they see, None is everything; ``is_causal`` leaves
    out what is behind a token. ``softcap`` squeezes logits.
    """

    query: Tensor
    parts: tuple[Store | Rectangle, ...]
    mask: Tensor | None
    is_causal: bool
    seen: int
    scaling: float
    softcap: float | None

    @property
    def kv_heads(self) -> int:
        part = self.parts[-1]
        return part.lengths.shape[1] if isinstance(part, Store) else part.keys.shape[1]

    @property
    def value_width(self) -> int:
        part = self.parts[-1]
        return part.values.width if isinstance(part, Store) else part.values.shape[-1]

    @property
    def dtypes(self) -> set[torch.dtype]:
        """Of all keys and values."""
        return {side.dtype for part in self.parts for side in (part.keys, part.values)}

    @property
    def needs_positions(self) -> bool:
        """Whether it matters where in the text a row is from."""
        return self.is_causal or self.mask is not None
