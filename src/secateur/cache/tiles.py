"""Rows under a bitmap, in tiles that a vector unit multiplies as it expands them.

A block is 64 consecutive rows of a segment; the last block of a segment may have fewer. A tile is 64 of its elements
that are multiplied together: 32 lanes of two steps each, the step running fastest. Keys are summed over channels, so
that a lane is a token and a step a channel; values are summed over tokens, so that a lane is a channel and a step a
token. Then a tile that was expanded is two or four vectors, and what multiplies it is the same for all lanes:

    keys    tile (half of the block, pair of channels)      half-major
    values  tile (32 channels, pair of tokens)              channel-major

A tile holds one 64-bit word with the places of its elements, the least significant bit first. The elements that stay of
a block follow each other without padding. Blocks lie in memory in the order in which they came; their words and starts
are in the order of the segments.

The tiles of Mustafar's own kernels are one step of 64 lanes, which suits tensor cores; two steps side by side suit
instructions that sum pairs of bfloat16, and waste nothing where a head has 96 channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from secateur.cache.rows import Rows, Span, behind, marked, require, runs
from secateur.rowmasks import pack_bits, unpack_rows

# Shapes: N rows, E head dimension, Z blocks, L tiles of a block; of a span: b sequences, k key-value heads, n rows of
# each segment, M queries of each key-value head.

BLOCK, LANES, STEPS = 64, 32, 2
LANES_OF = {"keys": "token", "values": "channel"}
"""what a lane is"""


def block_counts(lengths: Tensor) -> Tensor:
    """Rows of every block of segments of these lengths, int64 on the CPU, where only the last one may have fewer."""
    lengths = lengths.flatten().cpu()
    whole = -(-lengths // BLOCK)
    counts = torch.full((int(whole.sum()),), BLOCK)
    last = whole.cumsum(0)[whole > 0] - 1
    counts[last] = lengths[whole > 0] - (whole[whole > 0] - 1) * BLOCK
    return counts


@dataclass(frozen=True)
class BitmapRows(Rows):
    """``bits`` [Z, L] int64, ``values`` [elements], and of every block the first element, ``starts`` [Z] int64, and the
    number of rows, ``counts`` [Z] int64 on the CPU; ``width`` E. ``by`` says what a lane is, ``token`` or ``channel``.
    """

    bits: Tensor
    values: Tensor
    starts: Tensor
    counts: Tensor
    width: int
    by: str

    @classmethod
    def encode(cls, dense: Tensor, lengths: Tensor, by: str) -> BitmapRows:
        """``dense`` [N, E] by segments of ``lengths``, of which everything that isn't zero stays.

        By a kernel where there is one, which is several times as fast.
        """
        from secateur.cache.kernels.compression import encode

        counts = block_counts(lengths)
        width = dense.shape[-1]
        made = encode(dense, counts, _tile_count(width, by), by == "channel")
        if made is not None:
            bits, values, starts = made
            return cls(bits, values, starts, counts, width, by)
        if bool((counts == BLOCK).all()):
            blocks = dense.reshape(-1, BLOCK, width)
        else:
            blocks = dense.new_zeros(len(counts), BLOCK, width)
            blocks.flatten(0, 1)[_places(counts).to(dense.device)] = dense
        tiles = _tiles(blocks, by)
        mask = tiles != 0
        bits = pack_bits(mask.flatten(0, 1)).view(torch.int64).view(mask.shape[:2])
        kept = mask.sum(dim=(1, 2))
        return cls(bits, tiles[mask], kept.cumsum(0) - kept, counts, width, by)

    @property
    def count(self) -> int:
        return int(self.counts.sum())

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def elements(self) -> int:
        return self.values.numel()

    def tensors(self) -> dict[str, Tensor]:
        return {"bits": self.bits, "values": self.values, "starts": self.starts, "counts": self.counts}

    def _kept(self) -> Tensor:
        """Elements of every block."""
        return unpack_rows(self.bits.view(torch.uint8), (len(self.bits), 64 * self.bits.shape[1])).sum(dim=-1)

    @cached_property
    def _first_rows(self) -> Tensor:
        """The first row of every block, and the number of rows behind the last."""
        return F.pad(self.counts.cumsum(0), (1, 0))

    def first_blocks(self, lengths: Tensor) -> Tensor:
        """The first block of every segment, and the number of blocks behind the last, int64 on the CPU."""
        ends = F.pad(lengths.flatten().cpu().cumsum(0), (1, 0))
        return torch.searchsorted(self._first_rows, ends)

    def select(self, rows: Tensor, lengths: Tensor, segments: Tensor | None = None) -> BitmapRows:
        dense = self._dense(0, len(self.bits))[rows.to(self.bits.device)]
        return BitmapRows.encode(dense, lengths, self.by)

    def batch(self, segments: Tensor, lengths: Tensor) -> BitmapRows:
        ends = self.first_blocks(lengths)
        chosen = runs(ends[segments], ends.diff()[segments])
        picked = self._picked(chosen.to(self.bits.device))
        gone = torch.ones(len(self.bits), dtype=torch.bool)
        gone[chosen] = False
        return picked._compact() if bool(gone.any()) else picked

    def _picked(self, blocks: Tensor) -> BitmapRows:
        """These blocks; the elements of all stay where they are."""
        counts = self.counts[blocks.cpu()]
        return BitmapRows(self.bits[blocks], self.values, self.starts[blocks], counts, self.width, self.by)

    def _compact(self) -> BitmapRows:
        """Without elements of blocks that are gone."""
        kept = self._kept()
        starts, back = self.starts.unique(return_inverse=True)
        # blocks without elements share their start with another one
        sizes = torch.zeros_like(starts).scatter_reduce(0, back, kept, "amax")
        values = self.values[runs(starts, sizes)]
        moved = (sizes.cumsum(0) - sizes)[back]
        return BitmapRows(self.bits, values, moved, self.counts, self.width, self.by)

    def joined(self, dense: Tensor, lengths: Tensor, keep: Tensor | None = None) -> BitmapRows:
        more, counts = marked(dense, keep)
        new = BitmapRows.encode(more, counts, self.by)
        whole = BitmapRows(
            torch.cat([self.bits, new.bits]),
            torch.cat([self.values, new.values]),
            torch.cat([self.starts, new.starts + len(self.values)]),
            torch.cat([self.counts, new.counts]),
            self.width,
            self.by,
        )
        order = behind(self.first_blocks(lengths).diff(), new.first_blocks(counts).diff())
        return whole._picked(order.to(self.bits.device))

    def check(self, lengths: Tensor, like: Tensor) -> None:
        blocks, width = len(self.counts), like.shape[-1]
        if self.by not in LANES_OF.values() or self.width != width:
            raise ValueError(f"its tiles are by {self.by!r} and {self.width} wide, not {width}")
        require(self.counts, (blocks,), torch.int64, "counts")
        if bool(((self.counts < 1) | (self.counts > BLOCK)).any()):
            raise ValueError(f"its blocks have more than {BLOCK} rows, or none")
        ends = F.pad(lengths.flatten().cumsum(0), (1, 0))
        if self.count != int(ends[-1]) or not torch.equal(self._first_rows[self.first_blocks(lengths)], ends):
            raise ValueError("its blocks aren't those of its heads")
        require(self.bits, (blocks, _tile_count(width, self.by)), torch.int64, "bits")
        require(self.values, (len(self.values),), like.dtype, "elements")
        require(self.starts, (blocks,), torch.int64, "starts")
        if bool(((self.starts < 0) | (self.starts > len(self.values) - self._kept())).any()):
            raise ValueError("its blocks have more elements than there are")

    def logits(self, queries: Tensor, span: Span) -> Tensor:
        return queries @ self.dense(span).mT

    def mix(self, weights: Tensor, span: Span) -> Tensor:
        return weights @ self.dense(span)

    def dense(self, span: Span) -> Tensor:
        ends = torch.tensor([span.start, span.stop])
        first, last = torch.searchsorted(self._first_rows, ends).tolist()
        return self._dense(first, last).unflatten(0, (*span.shape, -1))

    def _dense(self, first: int, last: int) -> Tensor:
        """The rows of blocks ``first`` to ``last``, [rows, E]."""
        some = self._picked(torch.arange(first, last, device=self.bits.device))
        mask = unpack_rows(some.bits.view(torch.uint8), (*some.bits.shape, 64))
        tiles = self.values.new_zeros(mask.shape)
        tiles.masked_scatter_(mask, self.values[runs(some.starts, some._kept())])
        blocks = _blocks(tiles, self.by)[..., : self.width]
        if bool((some.counts == BLOCK).all()):
            return blocks.flatten(0, 1)
        return blocks.flatten(0, 1)[_places(some.counts).to(blocks.device)]


def _places(counts: Tensor) -> Tensor:
    """Where rows lie in blocks of 64, int64."""
    return runs(torch.arange(len(counts)) * BLOCK, counts)


def _tile_count(width: int, by: str) -> int:
    """Tiles of a block."""
    return BLOCK // LANES * -(-width // STEPS) if by == "token" else BLOCK // STEPS * -(-width // LANES)


def _tiles(blocks: Tensor, by: str) -> Tensor:
    """[Z, 64, E] → [Z, tiles, 64]."""
    if by == "token":
        pairs = F.pad(blocks, (0, blocks.shape[-1] % STEPS)).unflatten(-1, (-1, STEPS))
        return pairs.unflatten(1, (-1, LANES)).transpose(2, 3).flatten(3).flatten(1, 2)
    lanes = F.pad(blocks, (0, -blocks.shape[-1] % LANES)).unflatten(-1, (-1, LANES))
    return lanes.unflatten(1, (-1, STEPS)).permute(0, 3, 1, 4, 2).flatten(3).flatten(1, 2)


def _blocks(tiles: Tensor, by: str) -> Tensor:
    """Inverse of ``_tiles``, with the channels that padded it."""
    if by == "token":
        return (
            tiles.unflatten(1, (BLOCK // LANES, -1))
            .unflatten(-1, (LANES, STEPS))
            .transpose(2, 3)
            .flatten(3)
            .flatten(1, 2)
        )
    lanes = tiles.unflatten(1, (-1, BLOCK // STEPS)).unflatten(-1, (LANES, STEPS))
    return lanes.permute(0, 2, 4, 1, 3).flatten(3).flatten(1, 2)
