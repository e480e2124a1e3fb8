"""What a block does to the hidden states that go through it. B sequences, T tokens, D hidden."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from secateur.observe.statistics import Accumulator, Needs, at_least_float32


class Similarity(Accumulator):
    """Sum over tokens of the cosine between a block's input and output, float64 (ShortGPT's Block Influence).

    ``nothing`` is what counts where one of the two is zero, so that there is no cosine.
    """

    nothing: ClassVar[float] = 0.0

    def __init__(self) -> None:
        self.total = 0.0
        self.tokens = 0

    def update_pair(self, before_BTD: Tensor, after_BTD: Tensor) -> None:
        """Take in one batch of hidden states before and after the block."""
        cosine = torch.nn.functional.cosine_similarity(before_BTD.float(), after_BTD.float(), dim=-1)
        cosine[~(before_BTD.any(dim=-1) & after_BTD.any(dim=-1))] = self.nothing
        self.total += float(cosine.double().sum())
        self.tokens += cosine.numel()

    def update(self, x_BTC: Tensor) -> None:
        """Input and output of the block, concatenated along channels."""
        before, after = x_BTC.chunk(2, dim=-1)
        self.update_pair(before, after)

    def merge(self, other: Similarity) -> None:
        self.total += other.total
        self.tokens += other.tokens

    @property
    def mean(self) -> float:
        """Average cosine, in [-1, 1]."""
        return self.total / max(self.tokens, 1)


def angles(first: Tensor, second: Tensor) -> Tensor:
    """Angles between vectors along the last dimension as fractions of pi, float64 in [0, 1]; 1/3 where one is zero."""
    first, second = first.double(), second.double()
    norms = first.norm(dim=-1) * second.norm(dim=-1)
    # CFSP's published code takes 0.5 for a cosine that is not a number
    cosine = torch.where(norms > 0, (first * second).sum(dim=-1) / norms, 0.5)
    return cosine.clamp(-1, 1).arccos() / math.pi


class LastTokens(Accumulator):
    """Input and output of a block at the last token of every sequence, in order, float32 (float64 for float64 ones)."""

    @classmethod
    def needs(cls, channels: int, *, tokens: int, batch: int, length: int) -> Needs:
        """See ``Accumulator``: one row for every sequence, and nothing else is looked at."""
        rows = 4 * channels * (tokens // length)
        return Needs(state=rows, stored=rows, update=0, moved=rows)

    def __init__(self) -> None:
        self._rows: list[Tensor] = []

    def update(self, x_BTC: Tensor) -> None:
        """Input and output of the block, concatenated along channels."""
        # a copy, so that the whole batch needn't stay
        self._rows.append(at_least_float32(x_BTC[:, -1]).clone())

    def merge(self, other: LastTokens) -> None:
        self._rows += other._rows

    @property
    def rows_NC(self) -> Tensor:
        """[sequences, channels]: the first half of the channels entered the block, the second half left it."""
        return torch.cat(self._rows)


class Angle(Accumulator):
    """Sum over tokens of the angle between a block's input and output, as a fraction of pi, float64 (CFSP)."""

    def __init__(self) -> None:
        self.total = 0.0
        self.tokens = 0

    def update(self, x_BTC: Tensor) -> None:
        """Input and output of the block, concatenated along channels; a token of zeros on one side counts as 1/3."""
        angle = angles(*x_BTC.chunk(2, dim=-1))
        self.total += float(angle.sum())
        self.tokens += angle.numel()

    def merge(self, other: Angle) -> None:
        self.total += other.total
        self.tokens += other.tokens

    @property
    def mean(self) -> float:
        """Average angle over pi, in [0, 1]."""
        return self.total / max(self.tokens, 1)


class Change(Accumulator):
    """Sums over tokens of what a block changes in its input, float64: mean over channels of squares and of sizes."""

    def __init__(self) -> None:
        self.squares = 0.0
        self.sizes = 0.0
        self.tokens = 0

    def update(self, x_BTC: Tensor) -> None:
        """Input and output of the block, concatenated along channels."""
        before, after = (half.float() for half in x_BTC.chunk(2, dim=-1))
        change = (after - before).double()
        self.squares += float(change.square().mean(dim=-1).sum())
        self.sizes += float(change.abs().mean(dim=-1).sum())
        self.tokens += change.shape[:-1].numel()

    def merge(self, other: Change) -> None:
        self.squares += other.squares
        self.sizes += other.sizes
        self.tokens += other.tokens

    @property
    def square(self) -> float:
        """Mean squared change of an entry."""
        return self.squares / max(self.tokens, 1)

    @property
    def absolute(self) -> float:
        """Mean size of the change of an entry."""
        return self.sizes / max(self.tokens, 1)
