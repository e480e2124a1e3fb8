"""The contract between a KV cache and the methods that make it smaller.

A method looks at one layer's attention at the end of a prompt, and says which tokens, channels or elements stay. It
sees sequences without padding, all of the same length; the cache owns layers, padding and storage. Tokens may leave
again while the model decodes: the method then sees what is left of the text in the same words.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from secateur.criteria.attention import causal_attention, per_kv_head
from secateur.errors import OptionError, UnsupportedModelError
from secateur.methods.base import Method
from secateur.options import option

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
        cos, sin = torch.cat([angle.cos()] * 2, dim=-1), torch.cat([angle.sin()] * 2, dim=-1)
        width = cos.shape[-1]
        turning, rest = x[..., :width].float(), x[..., width:].float()
        first, second = turning.chunk(2, dim=-1)
        turned = turning * cos + torch.cat([-second, first], dim=-1) * sin
        return torch.cat([turned, rest.expand(*turned.shape[:-1], rest.shape[-1])], dim=-1)

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
        width = 2 * len(self.rope.frequencies)
        return torch.cat([back[..., :width] / self.rope.scale, back[..., width:]], dim=-1)

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


@dataclass(frozen=True, kw_only=True)
class CacheMethod(Method):
    """Makes the KV cache smaller while the model runs; ``stage`` says in which order methods follow each other."""

    instead: ClassVar[str] = (
        "makes the KV cache smaller while a model runs and leaves its weights alone: in Python, call"
        " model.generate(..., cache=secateur.compressed_cache('{name}', model))"
    )
    stage: ClassVar[str] = ""
    """``tokens``, then ``channels``, then ``elements``."""

    @property
    def is_identity(self) -> bool:
        """Whether these options remove nothing, so that the cache stays as it is."""
        raise NotImplementedError(f"{type(self).__name__} must define is_identity")


def kept_tokens(tokens: int, sparsity: float) -> int:
    """floor(S (1 - r)), at least 1; 10 tokens with sparsity 0.9 keep 1, which float arithmetic alone would miss."""
    return max(1, math.floor(tokens * (1 - sparsity) + 1e-9))


def top(score_BKS: Tensor, count: int) -> Tensor:
    """The ``count`` highest scores of every head as a mask; of equals the last tokens stay."""
    order = score_BKS.flip(-1).argsort(dim=-1, descending=True, stable=True)[..., :count]
    keep = torch.zeros_like(score_BKS, dtype=torch.bool)
    return keep.scatter(-1, score_BKS.shape[-1] - 1 - order, True)


def protect(score_BKS: Tensor, *, first: int = 0, last: int = 0) -> Tensor:
    """So many scores in front and behind that are 1 above the highest of the sequence, [B, K, first + S + last]."""
    highest = score_BKS.amax(dim=(1, 2), keepdim=True) + 1
    batch, heads, _ = score_BKS.shape
    sides = [highest.expand(batch, heads, count) for count in (first, last)]
    return torch.cat([sides[0], score_BKS, sides[1]], dim=-1)


@dataclass(frozen=True, kw_only=True)
class EvictionMethod(CacheMethod):
    """Removes tokens of the prompt, for every key-value head its own: score → allocate → gather."""

    sparsity: float = option(0.5, "fraction of the prompt's tokens removed from the cache", ge=0, lt=1)

    stage: ClassVar[str] = "tokens"
    local: ClassVar[bool] = False
    """Whether keys and values of the candidates are all that is looked at, so that any of them can be scored again."""
    again: ClassVar[bool] = True
    """Whether what is left of a text can be cut again, to any number of tokens, the same for all heads."""

    @property
    def is_identity(self) -> bool:
        return self.sparsity == 0

    @property
    def every(self) -> int:
        """Tokens of the text after which tokens leave again while the model decodes; 0 where those that stay, stay."""
        return 0

    @property
    def sums(self) -> bool:
        """Whether later tokens change what is carried of a token, so that they can't be taken back."""
        return False

    @property
    def remembered(self) -> int:
        """How many last queries are looked at when tokens leave while decoding, beyond those just read."""
        return 0

    @property
    def closes_gaps(self) -> bool:
        """Whether keys are turned, whenever they are attended to, as if nothing had been between those that stay."""
        return False

    @property
    def protected(self) -> int:
        """Tokens that are never evicted; a prompt that has no more than these stays whole, with a warning."""
        return 0

    @property
    def needs_rope(self) -> bool:
        """Whether ``prompt.rope`` is looked at."""
        return False

    def score(self, prompt: Prompt) -> Tensor:
        """Score of every token, [B, K, S] float32, higher = keep."""
        raise NotImplementedError(f"{type(self).__name__} must define score()")

    def kept(self, prompt: Prompt) -> int:
        """How many tokens every head keeps."""
        return kept_tokens(prompt.tokens, self.sparsity)

    def keep(self, prompt: Prompt) -> Tensor:
        """Which tokens stay, [B, K, S] bool; heads may keep different numbers."""
        return top(self.score(prompt), self.kept(prompt))

    def keep_again(self, left: Prompt) -> Tensor:
        """Which of the tokens that are left stay while the model decodes, [B, K, S] bool."""
        return self.keep(left)

    def carry(self, read: Prompt) -> Tensor | None:
        """What is kept of every token beside keys and values, [B, K, S] float32; None where nothing is.

        ``read.carried`` is what was kept before the last W tokens came, [B, K, S - W], None before the prompt.
        """
        return None

    def moved_keys(self, prompt: Prompt, keep: Tensor) -> Tensor:
        """The keys as they are stored, [B, K, S, E]; only what ``keep`` marks is looked at."""
        return prompt.keys


@dataclass(frozen=True, kw_only=True)
class BudgetMethod(EvictionMethod):
    """Keeps a number of tokens, whatever the length of the text: one leaves for every one that comes."""

    budget: int = option(
        0, "tokens that every head keeps, of the prompt and while decoding (0: sparsity, of the prompt alone)",
        unit="tokens", ge=0,
    )  # fmt: skip

    @property
    def is_identity(self) -> bool:
        return self.budget == 0 and self.sparsity == 0

    @property
    def every(self) -> int:
        return 1 if self.budget else 0

    def kept(self, prompt: Prompt) -> int:
        return min(prompt.tokens, self.budget) if self.budget else super().kept(prompt)


@dataclass(frozen=True, kw_only=True)
class WrapperMethod(EvictionMethod):
    """Changes how another method's scores become kept tokens; ``of`` names that method, with its options."""

    of: str = option("snapkv", "method that gives the scores, with its options (snapkv:window=32)")

    of_budgets: ClassVar[bool] = False
    """Whether it wraps methods by which tokens leave while decoding."""

    @cached_property
    def inner(self) -> EvictionMethod:
        """The wrapped method, at the wrapper's sparsity. Raises UsageError."""
        from secateur.methods.cachespec import wrapped

        return wrapped(self)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.inner.every and not self.of_budgets:
            raise OptionError(
                f"{self.name}: of must be a method that removes tokens of the prompt alone, got '{self.of}'; behind it,"
                " decoding(...) keeps a budget"
            )

    @property
    def is_identity(self) -> bool:
        return self.inner.is_identity

    @property
    def protected(self) -> int:
        return self.inner.protected

    @property
    def needs_rope(self) -> bool:
        return self.inner.needs_rope

    def score(self, prompt: Prompt) -> Tensor:
        return self.inner.score(prompt)

    def kept(self, prompt: Prompt) -> int:
        return self.inner.kept(prompt)

    def carry(self, read: Prompt) -> Tensor | None:
        return self.inner.carry(read)

    @property
    def sums(self) -> bool:
        return self.inner.sums

    def moved_keys(self, prompt: Prompt, keep: Tensor) -> Tensor:
        return self.inner.moved_keys(prompt, keep)


@dataclass(frozen=True, kw_only=True)
class CacheChannelMethod(CacheMethod):
    """Removes channels of keys or values of all but the last tokens, for every key-value head its own."""

    sparsity: float = option(0.4, "fraction of the channels of a head removed", ge=0, lt=1)
    recent: int = option(32, "last tokens that keep all channels", unit="tokens", ge=0)
    target: str = option("key", "which part of the cache loses channels", choices=("key", "value"))

    stage: ClassVar[str] = "channels"

    @property
    def is_identity(self) -> bool:
        return self.sparsity == 0

    def channel_score(self, prompt: Prompt) -> Tensor:
        """Score of every channel, [B, K, E] float32; keys and values of ``prompt`` are those that were not evicted."""
        raise NotImplementedError(f"{type(self).__name__} must define channel_score()")

    def channels(self, prompt: Prompt) -> Tensor:
        """Indices of the channels that stay, ascending, [B, K, kept] int64; of equals the first ones leave."""
        score_BKE = self.channel_score(prompt)
        width = score_BKE.shape[-1]
        order = score_BKE.argsort(dim=-1, stable=True)[..., int(width * self.sparsity) :]
        return order.sort(dim=-1).values


@dataclass(frozen=True, kw_only=True)
class CacheElementMethod(CacheMethod):
    """Removes single elements of keys and values of tokens that have left the window, also while decoding."""

    window: int = option(32, "last tokens that stay dense", unit="tokens", ge=1)
    block: int = option(256, "tokens that are pruned at a time as they leave the window", unit="tokens", ge=1)

    stage: ClassVar[str] = "elements"

    def side_sparsity(self, side: str) -> float:
        """Fraction of the elements removed of a ``side``: ``keys`` or ``values``."""
        raise NotImplementedError(f"{type(self).__name__} must define side_sparsity()")

    @property
    def is_identity(self) -> bool:
        return self.side_sparsity("keys") == 0 and self.side_sparsity("values") == 0

    def element_mask(self, x: Tensor, side: str) -> Tensor:
        """Which elements of ``x`` [..., tokens, E] stay, bool; tokens are consecutive and start a block."""
        raise NotImplementedError(f"{type(self).__name__} must define element_mask()")
