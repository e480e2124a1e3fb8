"""What a method that compresses the KV cache sees of one layer: its prompt, or what is left of the text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from secateur.criteria.attention import causal_attention, per_kv_head
from secateur.errors import UnsupportedModelError

# Shapes: B sequences, S tokens of the prompt (or what is left of the text), H query heads, K key-value heads
# (H = K * G), E head dimension, R rotated channels of a head, W queries of a window.


@dataclass(frozen=True)
class Rope:
    """The rotary embedding of a layer: channel i of the first half turns with channel i of the second half.

    ``frequencies`` is [R / 2] float32, in radians per position; channels from R on don't turn. ``scale`` is the factor
    that some variants put on cosines and sines.
    """

    frequencies: Tensor
    scale: float = 1.0

    def turned(self, x: Tensor, positions: Tensor) -> Tensor:
        """``x`` [..., E] turned by ``positions`` [...] (negative = back), without the scale; in float32."""
        angle = positions[..., None].to(torch.float32) * self.frequencies
        cos, sin, half = angle.cos(), angle.sin(), len(self.frequencies)
        x = x.float()
        first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        # written into the halves of one tensor: a prompt is large, and every copy of it costs as much as the arithmetic
        turned = x.new_empty(*torch.broadcast_shapes(x.shape[:-1], positions.shape), x.shape[-1])
        torch.mul(first, cos, out=turned[..., :half]).addcmul_(second, sin, value=-1)
        torch.mul(second, cos, out=turned[..., half : 2 * half]).addcmul_(first, sin)
        turned[..., 2 * half :] = rest
        return turned

    def mean_rotation(self, positions: Tensor, width: int) -> Tensor:
        """The mean over ``positions`` of the matrix that turns a vector of that width, [E, E] float32, with scale."""
        basis = torch.eye(width, device=positions.device)
        turned = self.turned(basis[None], positions[:, None])
        rotation = turned.mean(dim=0).mT
        rotated = 2 * len(self.frequencies)
        scaled = rotation.clone()
        scaled[:rotated, :rotated] *= self.scale
        return scaled


@dataclass(frozen=True)
class Prompt:
    """What the attention of one layer saw of a prompt; sequences of one length, without padding.

    ``keys`` and ``values`` are [B, K, S, E], keys and ``queries`` [B, H, S, E] after the rotary embedding, in the
    model's dtype. ``positions`` [B, S] are those of the queries in the rotary embedding. ``reader`` is the weight that
    reads the heads, [hidden, H * E]; ``hidden`` [B, S, hidden] is the input of the attention. Logits are ``scaling`` *
    q.k, squeezed by ``softcap`` where the model does so.

    While the model decodes, S are the tokens that are left of the text, of which ``places`` [B, K, S] int64 are the
    positions; queries, their positions and the hidden states are those of the last W tokens alone. ``carried``
    [B, K, S] float32 is what the method has made of every token so far (``EvictionMethod.carry``).
    """

    layer: int
    layers: int
    keys: Tensor
    values: Tensor
    queries: Tensor
    positions: Tensor
    scaling: float
    softcap: float | None = None
    rope: Rope | None = None
    reader: Tensor | None = None
    hidden: Tensor | None = None
    places: Tensor | None = None
    carried: Tensor | None = None

    @property
    def tokens(self) -> int:
        return self.keys.shape[2]

    def ages(self) -> Tensor:
        """How many tokens of the text have seen every token, itself included, [S] or [B, K, S] int64."""
        if self.places is None:
            return torch.arange(self.tokens, 0, -1, device=self.keys.device)
        return self.places[..., -1:] + 1 - self.places

    def attention(self, last: int) -> Tensor:
        """Attention probabilities of the ``last`` queries, [B, H, W, S] float32, causal within the window."""
        return causal_attention(self.queries[:, :, -last:], self.keys, self.scaling, self.softcap)

    def attention_in_parts(self, rows: int = 256) -> Iterator[Tensor]:
        """Attention probabilities of all queries, some rows at a time, so that memory stays linear in the prompt."""
        count = self.queries.shape[2]
        for start in range(0, count, rows):
            stop = min(start + rows, count)
            seen = self.tokens - count + stop
            part = causal_attention(self.queries[:, :, start:stop], self.keys[:, :, :seen], self.scaling, self.softcap)
            yield F.pad(part, (0, self.tokens - seen))

    def per_kv_head(self, x_BHx: Tensor) -> Tensor:
        """Mean over the query heads of every key-value head: [B, H, ...] → [B, K, ...]."""
        return per_kv_head(x_BHx, self.keys.shape[1])

    def unrotated_queries(self) -> Tensor:
        """The queries before the rotary embedding, [B, H, S, E] float32."""
        if self.rope is None:
            return self.queries.float()
        back = self.rope.turned(self.queries, -self.positions[:, None])
        if self.rope.scale != 1:
            back[..., : 2 * len(self.rope.frequencies)] /= self.rope.scale
        return back

    def output_weights(self, method: str) -> Tensor:
        """``reader`` by query heads, [H, E, hidden] float32. Raises UnsupportedModelError where it isn't known."""
        heads, width = self.queries.shape[1], self.queries.shape[3]
        if self.reader is None or self.reader.shape[1] != heads * width:
            raise UnsupportedModelError(
                f"{method} needs the weight that reads the heads of layer {self.layer}, and the attention of this model"
                " has none that is known"
            )
        return self.reader.float().mT.reshape(heads, width, -1)

    def sample(self, index: int, padding: int, unread: int | None = None) -> Prompt:
        """One sequence of a batch without the padding on its left, of keys and (``unread``, if not as many) queries."""
        one, read = slice(index, index + 1), slice(padding if unread is None else unread, None)
        return replace(
            self,
            keys=self.keys[one, :, padding:],
            values=self.values[one, :, padding:],
            queries=self.queries[one, :, read],
            positions=self.positions[one, read],
            hidden=None if self.hidden is None else self.hidden[one, read],
            places=None if self.places is None else self.places[one, :, padding:],
            carried=None if self.carried is None else self.carried[one, :, padding:],
        )

    def head(self, index: int) -> Prompt:
        """One key-value head with its queries."""
        group = self.queries.shape[1] // self.keys.shape[1]
        one = slice(index, index + 1)
        return replace(
            self,
            keys=self.keys[:, one],
            values=self.values[:, one],
            queries=self.queries[:, index * group : (index + 1) * group],
        )
