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


def rows_of(segments: Tensor, lengths: Tensor) -> Tensor:
    """The rows of these segments, int64, where all lie one after the other."""
    lengths = lengths.flatten()
    starts = lengths.cumsum(0) - lengths
    return runs(starts[segments], lengths[segments])


def marked(dense: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """The rows of [segments, m, E] that ``keep`` marks, or all, one after the other, and how many of every segment."""
    if keep is None:
        return dense.flatten(0, 1), torch.full(dense.shape[:1], dense.shape[1])
    return dense[keep], keep.sum(dim=-1).cpu()


def behind(counts: Tensor, more: Tensor) -> Tensor:
    """The order that puts ``more`` of every segment behind its ``counts``, where all ``more`` lie behind all of these.

    Both [segments] int64 on the CPU, and so is the order.
    """
    segments = torch.arange(len(counts))
    return torch.cat([segments.repeat_interleave(counts), segments.repeat_interleave(more)]).argsort(stable=True)


def runs(starts: Tensor, counts: Tensor) -> Tensor:
    """starts[0], starts[0] + 1, ... ``counts[0]`` of them, then those of the next run; int64."""
    before = (counts.cumsum(0) - counts).repeat_interleave(counts)
    return starts.repeat_interleave(counts) + torch.arange(int(counts.sum()), device=counts.device) - before


def require(tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, name: str) -> None:
    """Raises ValueError where a tensor isn't of this shape and dtype."""
    if tensor.shape != shape or tensor.dtype != dtype:
        raise ValueError(f"its {name} are {tensor.dtype} of {list(tensor.shape)}, not {dtype} of {list(shape)}")


class Rows(ABC):
    """The rows of keys or of values of one layer; ``width`` E is that of a whole row."""

    width: int

    @property
    @abstractmethod
    def count(self) -> int:
        """N, the number of rows."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Everything that is held, by name."""

    @abstractmethod
    def select(self, rows: Tensor, lengths: Tensor, segments: Tensor | None = None) -> Rows:
        """These rows in this order, int64, in segments of ``lengths``; ``segments`` are whose they were."""

    @abstractmethod
    def batch(self, segments: Tensor, lengths: Tensor) -> Rows:
        """These segments as a whole and in this order, int64; ``lengths`` are the rows of every segment there is."""

    @abstractmethod
    def joined(self, dense: Tensor, lengths: Tensor, keep: Tensor | None = None) -> Rows:
        """With rows [segments, m, E], encoded the same way, behind those of every segment, ``lengths`` so far.

        Of them those that ``keep`` [segments, m] bool marks, or all.
        """

    @abstractmethod
    def logits(self, queries: Tensor, span: Span) -> Tensor:
        """q.k of queries [b, k, M, E] with the keys of a span, [b, k, M, n]."""

    @abstractmethod
    def mix(self, weights: Tensor, span: Span) -> Tensor:
        """Weighted sums of the values of a span: [b, k, M, n] → [b, k, M, E]."""

    @abstractmethod
    def dense(self, span: Span) -> Tensor:
        """The rows of a span with zeros where something was removed, [b, k, n, E]."""

    @abstractmethod
    def check(self, lengths: Tensor, like: Tensor) -> None:
        """Raises ValueError where these aren't rows of segments of ``lengths``, wide and of a dtype as ``like`` is.

        For rows that come from outside: kernels don't look again, and would read behind the end of memory.
        """

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Of the numbers that are kept."""

    @property
    @abstractmethod
    def elements(self) -> int:
        """Numbers that are kept, without what says where they belong."""


@dataclass(frozen=True)
class DenseRows(Rows):
    """Whole rows, ``x`` [N, E]."""

    x: Tensor

    @property
    def width(self) -> int:  # type: ignore[override]
        return self.x.shape[-1]

    @property
    def count(self) -> int:
        return self.x.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype

    @property
    def elements(self) -> int:
        return self.x.numel()

    def tensors(self) -> dict[str, Tensor]:
        return {"x": self.x}

    def select(self, rows: Tensor, lengths: Tensor, segments: Tensor | None = None) -> DenseRows:
        return DenseRows(self.x[rows.to(self.x.device)])

    def batch(self, segments: Tensor, lengths: Tensor) -> DenseRows:
        return self.select(rows_of(segments, lengths), lengths)

    def joined(self, dense: Tensor, lengths: Tensor, keep: Tensor | None = None) -> DenseRows:
        more, counts = marked(dense, keep)
        order = behind(lengths.flatten(), counts).to(self.x.device)
        return DenseRows(torch.cat([self.x, more])[order])

    def check(self, lengths: Tensor, like: Tensor) -> None:
        require(self.x, (int(lengths.sum()), like.shape[-1]), like.dtype, "rows")

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
    def dtype(self) -> torch.dtype:
        return self.x.dtype

    @property
    def elements(self) -> int:
        return self.x.numel()

    def tensors(self) -> dict[str, Tensor]:
        return {"x": self.x, "channels": self.channels}

    def select(self, rows: Tensor, lengths: Tensor, segments: Tensor | None = None) -> ThinRows:
        channels = self.channels if segments is None else self.channels[segments.to(self.channels.device)]
        return ThinRows(self.x[rows.to(self.x.device)], channels, self.width)

    def batch(self, segments: Tensor, lengths: Tensor) -> ThinRows:
        return self.select(rows_of(segments, lengths), lengths, segments)

    def joined(self, dense: Tensor, lengths: Tensor, keep: Tensor | None = None) -> ThinRows:
        raise NotImplementedError("tokens that follow the prompt keep all their channels")

    def check(self, lengths: Tensor, like: Tensor) -> None:
        stay = self.channels.shape[-1]
        require(self.x, (int(lengths.sum()), stay), like.dtype, "rows")
        require(self.channels, (lengths.numel(), stay), torch.int16, "channels")
        if self.width != like.shape[-1] or bool(((self.channels < 0) | (self.channels >= self.width)).any()):
            raise ValueError("its channels aren't among those of a head")

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
