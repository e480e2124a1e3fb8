"""The contract between a KV cache and the methods that make it smaller.

A method looks at one layer's attention at the end of a prompt, and says which tokens, channels or elements stay. It
sees sequences without padding, all of the same length; the cache owns layers, padding and storage. Tokens may leave
again while the model decodes: the method then sees what is left of the text in the same words.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from secateur.allocate import part_of
from secateur.errors import OptionError
from secateur.methods.base import Method
from secateur.methods.elements import Largest
from secateur.methods.prompts import Prompt
from secateur.options import option

if TYPE_CHECKING:
    from secateur.methods.rereading import Passage, Reader

# Shapes: B sequences, S tokens of the prompt (or what is left of the text), K key-value heads, E head dimension,
# C tokens of a passage, n keys of what is read again.


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

    @property
    def by_sparsity(self) -> bool:
        """Whether ``sparsity`` says how much leaves."""
        return True


def kept_tokens(tokens: int, sparsity: float) -> int:
    """floor(S (1 - r)), at least 1."""
    return max(1, part_of(tokens, 1 - sparsity))


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
    replaces_sparsity: ClassVar[str] = ""
    """The option that takes the place of the sparsity where it is given."""
    local: ClassVar[bool] = False
    """Whether keys and values of the candidates are all that is looked at, so that any of them can be scored again."""
    reads_values: ClassVar[bool] = True
    """Whether values are looked at; a ``local`` method that doesn't isn't always given them."""
    rereads: ClassVar[bool] = False
    """Whether it is a ``RereadMethod``."""
    again: ClassVar[bool] = True
    """Whether what is left of a text can be cut again, to any number of tokens, the same for all heads."""

    @property
    def is_identity(self) -> bool:
        return self.sparsity == 0

    @property
    def by_fraction(self) -> bool:
        """Whether a fraction of the prompt leaves: that of ``sparsity``, or another one."""
        return self.by_sparsity

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
    def settles(self) -> bool:
        """Whether every token is decided on once, when it leaves the ``protected`` last ones, by what is carried."""
        return False

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

    replaces_sparsity: ClassVar[str] = "budget"

    @property
    def by_sparsity(self) -> bool:
        return self.budget == 0

    @property
    def is_identity(self) -> bool:
        return self.budget == 0 and self.sparsity == 0

    @property
    def every(self) -> int:
        return 1 if self.budget else 0

    def kept(self, prompt: Prompt) -> int:
        return min(prompt.tokens, self.budget) if self.budget else super().kept(prompt)


@dataclass(frozen=True, kw_only=True)
class RereadMethod(EvictionMethod):
    """Lets the model read the prompt again before tokens leave, of all layers at once; needs its tokenizer."""

    again: ClassVar[bool] = False
    rereads: ClassVar[bool] = True

    def passages(self, text: Tensor, tokenizer: Reader) -> list[Passage]:
        """What is read behind a prompt [S] int64 of one sequence."""
        raise NotImplementedError(f"{type(self).__name__} must define passages()")

    def reread(self, read: Prompt, passage: slice) -> Tensor:
        """Scores of the tokens of a passage in one layer, [1, K, C] float32.

        ``read`` holds what the attention saw when it was read again: keys and values [1, K, n, E] of the first
        ``protected`` tokens, of the ``passage`` and of what was read, with the queries of the latter.
        """
        raise NotImplementedError(f"{type(self).__name__} must define reread()")

    def keep_of_all(self, scores: list[Tensor]) -> list[Tensor]:
        """Scores of every layer, [K, S] float32 each → which tokens stay, [K, S] bool each."""
        raise NotImplementedError(f"{type(self).__name__} must define keep_of_all()")


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
        if (self.inner.every or not self.inner.by_fraction) and not self.of_budgets:
            raise OptionError(
                f"{self.name}: of must be a method that removes a fraction of the prompt, and nothing while decoding,"
                f" got '{self.of}'"
            )
        if self.inner.rereads:
            raise OptionError(
                f"{self.name}: of must be a method that scores one layer after the other, and '{self.of}' decides on"
                " all of them together"
            )

    @property
    def is_identity(self) -> bool:
        return self.inner.is_identity

    @property
    def by_sparsity(self) -> bool:
        return self.inner.by_sparsity

    @property
    def by_fraction(self) -> bool:
        return self.inner.by_fraction

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
        order = score_BKE.argsort(dim=-1, stable=True)[..., part_of(width, self.sparsity) :]
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

    def largest(self, side: str, width: int) -> Largest | None:
        """What stays of every row of ``width`` elements, where that is all that counts; None asks ``element_mask``."""
        return None

    def element_mask(self, x: Tensor, side: str) -> Tensor:
        """Which elements of ``x`` [..., tokens, E] stay, bool; tokens are consecutive and start a block."""
        rule = self.largest(side, x.shape[-1])
        if rule is None:
            raise NotImplementedError(f"{type(self).__name__} must define largest() or element_mask()")
        return rule.mask(x)
