"""The older part of a layer's cache, in which something was removed: rows of keys and values, segment by segment."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from secateur.cache.rows import DenseRows, Rows, Span, rows_of
from secateur.cache.tiles import BitmapRows, block_counts


@dataclass(frozen=True)
class Store:
    """``lengths`` [B, K] int64 on the CPU are the rows of every segment; ``positions`` [N] int32 those in the text.

    Positions count the tokens that the cache was given, padding included; None where nothing was evicted, and row r of
    a segment is token r.
    """

    lengths: Tensor
    keys: Rows
    values: Rows
    positions: Tensor | None = None

    @property
    def is_ragged(self) -> bool:
        """Whether heads hold different numbers of tokens."""
        return bool((self.lengths != self.lengths.flatten()[0]).any())

    @property
    def rows(self) -> int:
        """Rows of every segment, where it isn't ragged."""
        return int(self.lengths.flatten()[0])

    @cached_property
    def layout(self) -> tuple[Tensor, Tensor]:
        """The first row of every block and the first block of every segment, int64, each with its end behind the last.

        Where keys and values both lie in blocks, these are the same: both were given the same rows at the same times.
        """
        counts = next((s.counts for s in (self.keys, self.values) if isinstance(s, BitmapRows)), None)
        counts = block_counts(self.lengths) if counts is None else counts
        rows = F.pad(counts.cumsum(0), (1, 0))
        return rows, torch.searchsorted(rows, F.pad(self.lengths.flatten().cumsum(0), (1, 0)))

    def spans(self) -> Iterator[tuple[Span, slice, slice]]:
        """Spans of equal segments, with the sequences and heads that they cover: all at once, or one by one."""
        batch, heads = self.lengths.shape
        if not self.is_ragged:
            yield Span(0, self.keys.count, 0, (batch, heads)), slice(None), slice(None)
            return
        start = 0
        for segment, length in enumerate(self.lengths.flatten().tolist()):
            b, k = divmod(segment, heads)
            yield Span(start, start + length, segment, (1, 1)), slice(b, b + 1), slice(k, k + 1)
            start += length

    def text_positions(self, span: Span) -> Tensor:
        """Positions of the rows of a span in the text, [b, k, n] int64."""
        if self.positions is not None:
            return span.view(self.positions[:, None])[..., 0].long()
        device = next(iter(self.keys.tensors().values())).device
        count = (span.stop - span.start) // (span.shape[0] * span.shape[1])
        return torch.arange(count, device=device).expand(*span.shape, count)

    def joined(self, keys: Tensor, values: Tensor, positions: Tensor | None, keep: Tensor | None = None) -> Store:
        """With rows [B, K, m, E], or those that ``keep`` [B, K, m] marks, behind those of every segment."""
        keep = None if keep is None else keep.flatten(0, 1)
        together = None
        if self.positions is not None and positions is not None:
            held = DenseRows(self.positions[:, None])
            more = positions.flatten(0, 1)[..., None].to(torch.int32)
            together = held.joined(more, self.lengths, keep).x[:, 0]
        return Store(
            self.lengths + (keys.shape[2] if keep is None else keep.sum(dim=-1).cpu().view_as(self.lengths)),
            self.keys.joined(keys.flatten(0, 1), self.lengths, keep),
            self.values.joined(values.flatten(0, 1), self.lengths, keep),
            together,
        )

    def before(self, limit: int) -> Store:
        """Without the rows of tokens from position ``limit`` on."""
        owner = torch.arange(self.lengths.numel()).repeat_interleave(self.lengths.flatten())
        starts = self.lengths.flatten().cumsum(0) - self.lengths.flatten()
        own = self.positions.cpu() if self.positions is not None else torch.arange(len(owner)) - starts[owner]
        stays = own < limit
        rows = stays.nonzero()[:, 0]
        lengths = torch.bincount(owner[stays], minlength=self.lengths.numel()).view_as(self.lengths)
        return Store(
            lengths,
            self.keys.select(rows, lengths),
            self.values.select(rows, lengths),
            None if self.positions is None else self.positions[rows.to(self.positions.device)],
        )

    def batch(self, index: Tensor) -> Store:
        """The sequences ``index`` [new batch] int64 in this order."""
        heads = self.lengths.shape[1]
        segments = (index.cpu()[:, None] * heads + torch.arange(heads)).flatten()
        positions = self.positions
        if positions is not None:
            positions = positions[rows_of(segments, self.lengths).to(positions.device)]
        return Store(
            self.lengths[index.cpu()],
            self.keys.batch(segments, self.lengths),
            self.values.batch(segments, self.lengths),
            positions,
        )

    def tensors(self) -> dict[str, Tensor]:
        """Everything that is held, by name."""
        held = {f"keys.{name}": tensor for name, tensor in self.keys.tensors().items()}
        held |= {f"values.{name}": tensor for name, tensor in self.values.tensors().items()}
        return held if self.positions is None else {**held, "positions": self.positions}
