"""How the rows of a cache lie in memory: dense, without some channels, or as a bitmap with the elements that stay.

A row is one token of one key-value head. All rows of a layer lie one after the other, sequence by sequence, head by
head and token by token (a *segment* is one head of one sequence), so that heads may keep different numbers of tokens
without padding. A ``Span`` names consecutive segments of one length, on which attention works at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.rowmasks import pack_bits, unpack_rows

# Shapes: N rows, E head dimension, C channels that stay; of a span: b sequences, k key-value heads, n rows of each
# segment, M queries of each key-value head.


@dataclass(frozen=True)
class Span:
    """Rows ``start`` to ``stop``: the segments of ``shape`` (b, k), n rows each; ``first`` is the first segment."""

    start: int
    stop: int
    first: int
    shape: tuple[int, int]

    @property
    def segments(self) -> slice:
        return slice(self.first, self.first + self.shape[0] * self.shape[1])

    def view(self, rows: Tensor) -> Tensor:
        """[N, x] → the rows of this span, [b, k, n, x]."""
        return rows[self.start : self.stop].unflatten(0, (*self.shape, -1))


def runs(starts: Tensor, counts: Tensor) -> Tensor:
    """starts[0], starts[0] + 1, ... ``counts[0]`` of them, then those of the next run; int64."""
    before = (counts.cumsum(0) - counts).repeat_interleave(counts)
    return starts.repeat_interleave(counts) + torch.arange(int(counts.sum()), device=counts.device) - before


class Rows(ABC):
    """The rows of keys or of values of one layer."""

    @property
    @abstractmethod
    def count(self) -> int:
        """N, the number of rows."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Everything that is held, by name."""

    @abstractmethod
    def select(self, rows: Tensor, segments: Tensor | None = None) -> Rows:
        """These rows in this order, int64; ``segments`` are those that they come from when these change."""

    @abstractmethod
    def joined(self, dense: Tensor) -> Rows:
        """These rows and behind them others, [rows, E], which are encoded the same way."""

    @abstractmethod
    def logits(self, queries: Tensor, span: Span) -> Tensor:
        """q.k of queries [b, k, M, E] with the keys of a span, [b, k, M, n]."""

    @abstractmethod
    def mix(self, weights: Tensor, span: Span) -> Tensor:
        """Weighted sums of the values of a span: [b, k, M, n] → [b, k, M, E]."""

    @abstractmethod
    def dense(self, span: Span) -> Tensor:
        """The rows of a span with zeros where something was removed, [b, k, n, E]."""

    @property
    @abstractmethod
    def elements(self) -> int:
        """Numbers that are kept, without what says where they belong."""


@dataclass(frozen=True)
class DenseRows(Rows):
    """Whole rows, ``x`` [N, E]."""

    x: Tensor

    @property
    def count(self) -> int:
        return self.x.shape[0]

    @property
    def elements(self) -> int:
        return self.x.numel()

    def tensors(self) -> dict[str, Tensor]:
        return {"x": self.x}

    def select(self, rows: Tensor, segments: Tensor | None = None) -> DenseRows:
        return DenseRows(self.x[rows])

    def joined(self, dense: Tensor) -> DenseRows:
        return DenseRows(torch.cat([self.x, dense]))

    def logits(self, queries: Tensor, span: Span) -> Tensor:
        return queries @ span.view(self.x).mT

    def mix(self, weights: Tensor, span: Span) -> Tensor:
        return weights @ span.view(self.x)

    def dense(self, span: Span) -> Tensor:
        return span.view(self.x)


@dataclass(frozen=True)
class ThinRows(Rows):
    """Rows without some channels: ``x`` [N, C], ``channels`` [segments, C] int16, ``width`` E."""

    x: Tensor
    channels: Tensor
    width: int

    @classmethod
    def encode(cls, dense: Tensor, lengths: Tensor, channels: Tensor) -> ThinRows:
        """``dense`` [N, E] by segments of ``lengths``, of which ``channels`` [segments, C] stay."""
        of_row = channels.repeat_interleave(lengths.to(channels.device), dim=0)
        return cls(dense.gather(-1, of_row), channels.to(torch.int16), dense.shape[-1])

    @property
    def count(self) -> int:
        return self.x.shape[0]

    @property
    def elements(self) -> int:
        return self.x.numel()

    def tensors(self) -> dict[str, Tensor]:
        return {"x": self.x, "channels": self.channels}

    def select(self, rows: Tensor, segments: Tensor | None = None) -> ThinRows:
        channels = self.channels if segments is None else self.channels[segments]
        return ThinRows(self.x[rows], channels, self.width)

    def joined(self, dense: Tensor) -> ThinRows:
        raise NotImplementedError("tokens that follow the prompt keep all their channels")

    def _index(self, span: Span, rows: int) -> Tensor:
        channels = self.channels[span.segments].long().unflatten(0, span.shape)
        return channels[:, :, None].expand(-1, -1, rows, -1)

    def logits(self, queries: Tensor, span: Span) -> Tensor:
        return queries.gather(-1, self._index(span, queries.shape[2])) @ span.view(self.x).mT

    def mix(self, weights: Tensor, span: Span) -> Tensor:
        return self._widened(weights @ span.view(self.x), span)

    def dense(self, span: Span) -> Tensor:
        return self._widened(span.view(self.x), span)

    def _widened(self, thin: Tensor, span: Span) -> Tensor:
        wide = thin.new_zeros(*thin.shape[:-1], self.width)
        return wide.scatter(-1, self._index(span, thin.shape[2]), thin)


@dataclass(frozen=True)
class BitmapRows(Rows):
    """Rows without some elements: one bit per element, and the elements that stay, one after the other.

    ``bits`` [N, ceil(E / 8)] uint8, the least significant bit first; ``values`` [elements] in the order of the bits;
    ``width`` E.
    """

    bits: Tensor
    values: Tensor
    width: int

    @classmethod
    def encode(cls, dense: Tensor) -> BitmapRows:
        """``dense`` [N, E], of which everything that isn't zero stays."""
        mask = dense != 0
        return cls(pack_bits(mask), dense[mask], dense.shape[-1])

    @property
    def count(self) -> int:
        return self.bits.shape[0]

    @property
    def elements(self) -> int:
        return self.values.numel()

    def tensors(self) -> dict[str, Tensor]:
        return {"bits": self.bits, "values": self.values}

    def mask(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Which elements stay of these rows, [rows, E] bool."""
        bits = self.bits[start:stop]
        return unpack_rows(bits, (len(bits), self.width))

    def _counts(self) -> Tensor:
        return self.mask().sum(dim=-1)

    def select(self, rows: Tensor, segments: Tensor | None = None) -> BitmapRows:
        counts = self._counts()
        starts = counts.cumsum(0) - counts
        return BitmapRows(self.bits[rows], self.values[runs(starts[rows], counts[rows])], self.width)

    def joined(self, dense: Tensor) -> BitmapRows:
        more = BitmapRows.encode(dense)
        return BitmapRows(torch.cat([self.bits, more.bits]), torch.cat([self.values, more.values]), self.width)

    def logits(self, queries: Tensor, span: Span) -> Tensor:
        return queries @ self.dense(span).mT

    def mix(self, weights: Tensor, span: Span) -> Tensor:
        return weights @ self.dense(span)

    def dense(self, span: Span) -> Tensor:
        mask = self.mask(span.start, span.stop)
        before = int(self.mask(0, span.start).sum()) if span.start else 0
        rows = self.values.new_zeros(mask.shape)
        rows.masked_scatter_(mask, self.values[before:])
        return rows.unflatten(0, (*span.shape, -1))
