"""Decode attention on a GPU, in Triton: one program per segment and run of blocks, merged in torch.

A program loads what is stored of 64 rows, puts every element in its place by sums over the bits before it, and goes on
as if the block had been dense. With TRITON_INTERPRET=1 set before it is imported it runs on tensors of the CPU too.
"""

# a type of Triton's is a value that pyright doesn't know
# pyright: reportInvalidTypeForm=false
# Shapes: P segments, R runs of blocks, M queries of a key-value head, E head dimension.

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from secateur.cache.kernels.problem import Problem, Rectangle
from secateur.cache.rows import DenseRows, Rows, ThinRows
from secateur.cache.store import Store
from secateur.cache.tiles import BLOCK, LANES, BitmapRows
from secateur.errors import require_extra

_WHY = "attention over a compressed cache on a GPU"
triton: Any = require_extra("triton", "gpu", _WHY)
tl: Any = require_extra("triton.language", "gpu", _WHY)

LOWEST = torch.finfo(torch.float32).min
RUN = 8
"""blocks of a program"""
# the interpreter multiplies the bits of bfloat16 as if they were whole numbers
_DOT = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _tiles(x, bits, start, at, there):
    """The tiles whose words are at ``at``, [tiles, 64]; their block's elements begin with ``start``."""
    words = tl.load(bits + at, mask=there, other=0)
    on = ((words[:, None] >> tl.arange(0, 64)[None, :]) & 1).to(tl.int32)
    count = tl.sum(on, axis=1)
    before = (tl.cumsum(count, axis=0) - count)[:, None] + tl.cumsum(on, axis=1) - on
    return tl.load(x + start + before, mask=on == 1, other=0)


@triton.jit
def _attend(
    query, queries, tokens, segment_rows, block_rows, blocks,
    keys, key_bits, key_starts, values, value_bits, value_starts,
    positions, mask, mask_batch, mask_token, first, kv_heads,
    maxima, totals, mixed, scaling, softcap,
    M: tl.constexpr, KEY: tl.constexpr, KEYS: tl.constexpr, VALUE: tl.constexpr, VALUES: tl.constexpr,
    KEY_TILES: tl.constexpr, VALUE_TILES: tl.constexpr, HAS_POSITIONS: tl.constexpr, MASK: tl.constexpr,
    CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr, RUN: tl.constexpr, LOWEST: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """KEY and VALUE are the stored channels of a row, KEYS and VALUES the powers of two that hold them."""
    segment = tl.program_id(0).to(tl.int64)
    run = tl.program_id(1)
    begin = tl.load(blocks + segment) + run * RUN
    end = tl.minimum(begin + RUN, tl.load(blocks + segment + 1))
    m = tl.arange(0, M)
    channel, value_channel, place = tl.arange(0, KEYS), tl.arange(0, VALUES), tl.arange(0, 64)
    q = tl.load(
        query + (segment * queries + m[:, None]) * KEY + channel[None, :],
        mask=(m[:, None] < queries) & (channel[None, :] < KEY), other=0,
    )  # fmt: skip
    high = tl.full([M], LOWEST, tl.float32)
    total = tl.zeros([M], tl.float32)
    sums = tl.zeros([M, VALUES], tl.float32)
    segment_row = tl.load(segment_rows + segment)
    for block in range(begin, end):
        row = tl.load(block_rows + block)
        rows = tl.load(block_rows + block + 1) - row
        if KEY_TILES > 0:
            # [halves, pairs, tokens, steps]
            tile = tl.arange(0, KEYS)
            half, pair = tile // (KEYS // 2), tile % (KEYS // 2)
            at = block * KEY_TILES + half * (KEY_TILES // 2) + pair
            k = _tiles(keys, key_bits, tl.load(key_starts + block), at, pair < KEY_TILES // 2)
            k = tl.reshape(tl.permute(tl.reshape(k, (2, KEYS // 2, 32, 2)), (1, 3, 0, 2)), (KEYS, 64))
        else:
            k = tl.load(
                keys + (row + place[None, :]) * KEY + channel[:, None],
                mask=(place[None, :] < rows) & (channel[:, None] < KEY), other=0,
            )  # fmt: skip
        x = tl.dot(q.to(DOT), k.to(DOT), input_precision="ieee") * scaling
        if SOFTCAP:
            x = softcap * (1 - 2 / (tl.exp(2 * x / softcap) + 1))
        if CAUSAL or MASK > 0:
            token = m % tokens
            if HAS_POSITIONS:
                position = tl.load(positions + row + place, mask=place < rows, other=0).to(tl.int64)
            else:
                position = row - segment_row + place
            if CAUSAL:
                x = tl.where(position[None, :] > first + token[:, None], LOWEST, x)
            if MASK > 0:
                sequence = segment // kv_heads
                at = sequence * mask_batch + token[:, None] * mask_token + position[None, :]
                inside = (m[:, None] < queries) & (place[None, :] < rows)
                seen = tl.load(mask + at, mask=inside, other=0)
                x = tl.where(seen == 0, LOWEST, x) if MASK == 1 else tl.maximum(x + seen, LOWEST)
        x = tl.where(place[None, :] < rows, x, float("-inf"))
        higher = tl.maximum(high, tl.max(x, axis=1))
        weight = tl.exp(x - higher[:, None])
        factor = tl.exp(high - higher)
        total = total * factor + tl.sum(weight, axis=1)
        if VALUE_TILES > 0:
            # [columns, pairs, channels, steps]
            tile = tl.arange(0, VALUES)
            v = _tiles(
                values, value_bits, tl.load(value_starts + block), block * VALUE_TILES + tile, tile < VALUE_TILES
            )
            v = tl.reshape(tl.permute(tl.reshape(v, (VALUES // 32, 32, 32, 2)), (1, 3, 0, 2)), (64, VALUES))
        else:
            v = tl.load(
                values + (row + place[:, None]) * VALUE + value_channel[None, :],
                mask=(place[:, None] < rows) & (value_channel[None, :] < VALUE), other=0,
            )  # fmt: skip
        rounded = weight.to(v.dtype).to(DOT)
        sums = sums * factor[:, None] + tl.dot(rounded, v.to(DOT), input_precision="ieee")
        high = higher
    out = (run * tl.num_programs(0) + segment) * M + m
    tl.store(maxima + out, high)
    tl.store(totals + out, total)
    tl.store(mixed + out[:, None] * VALUES + value_channel[None, :], sums)


def attend(problem: Problem) -> Tensor:
    """softmax(scaling * q.k) v over all parts, [B, T, H, E] in the query's dtype."""
    query = problem.query
    batch, heads, tokens, _ = query.shape
    grouped = query.reshape(batch * problem.kv_heads, -1, query.shape[-1])
    found = [_part(problem, part, grouped) for part in problem.parts]
    maxima = torch.cat([maxima for maxima, _, _ in found])
    factors = (maxima - maxima.amax(dim=0)).exp()
    total = (factors * torch.cat([totals for _, totals, _ in found])).sum(dim=0)
    # parts may differ in the width that they were padded to
    mixed = torch.cat([mixed[..., : problem.value_width] for _, _, mixed in found])
    out = (factors[..., None] * mixed).sum(dim=0) / total[..., None]
    by_head = out[:, : grouped.shape[1]].reshape(batch, heads, tokens, -1)
    return by_head.transpose(1, 2).contiguous().to(query.dtype)


def _part(problem: Problem, part: Store | Rectangle, query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Maxima and sums of weights [R, P, M], and weighted sums of values [R, P, M, E], of the runs of a part."""
    keys, values, rows, blocks, positions = _stored(part, query.device)
    segments, queries = query.shape[:2]
    if isinstance(keys, ThinRows):
        query = query.gather(-1, keys.channels.long()[:, None].expand(-1, queries, -1))
    key, value = _Stored(keys), _Stored(values)
    runs = max(1, -(-int(blocks.diff().max()) // RUN))
    padded = max(16, triton.next_power_of_2(queries))
    maxima, totals = (torch.empty(runs, segments, padded, device=query.device) for _ in range(2))
    mixed = torch.empty(runs, segments, padded, value.padded, device=query.device)
    mask = problem.mask
    blocks = blocks.to(query.device)
    _attend[(segments, runs)](
        query.contiguous(), queries, problem.query.shape[2], rows[blocks], rows, blocks,
        key.x, key.bits, key.starts, value.x, value.bits, value.starts,
        rows if positions is None else positions,
        rows if mask is None else mask.to(torch.int8) if mask.dtype == torch.bool else mask.float(),
        0 if mask is None or mask.shape[0] == 1 else mask.shape[1] * mask.shape[2],
        0 if mask is None or mask.shape[1] == 1 else mask.shape[2],
        problem.seen - problem.query.shape[2], problem.kv_heads,
        maxima, totals, mixed, problem.scaling, problem.softcap or 0.0,
        M=padded, KEY=key.stored, KEYS=key.padded, VALUE=value.stored, VALUES=value.padded,
        KEY_TILES=key.tiles, VALUE_TILES=value.tiles, HAS_POSITIONS=positions is not None,
        MASK=0 if mask is None else 1 if mask.dtype == torch.bool else 2,
        CAUSAL=problem.is_causal, SOFTCAP=problem.softcap is not None, RUN=RUN, LOWEST=LOWEST,
        DOT=_DOT[torch.float32 if query.device.type == "cpu" else query.dtype],
    )  # fmt: skip
    mixed = mixed[..., : value.stored]
    if isinstance(values, ThinRows):
        channels = values.channels.long()[None, :, None].expand(*mixed.shape[:3], -1)
        mixed = mixed.new_zeros(*mixed.shape[:3], values.width).scatter(-1, channels, mixed)
    return maxima, totals, mixed


class _Stored:
    """One side of a part as the kernel takes it: tensors, stored channels of a row, and what these are padded to."""

    def __init__(self, rows: Rows) -> None:
        self.x = self.bits = self.starts = next(iter(rows.tensors().values()))
        self.tiles, self.stored = 0, rows.width
        if isinstance(rows, BitmapRows):
            self.x, self.bits, self.starts = rows.values, rows.bits, rows.starts
            self.tiles = rows.bits.shape[1]
        else:
            self.stored = self.x.shape[-1]
        self.padded = max(LANES, triton.next_power_of_2(self.stored))


def _stored(part: Store | Rectangle, device: torch.device) -> tuple[Rows, Rows, Tensor, Tensor, Tensor | None]:
    """Keys, values, the first row of every block (on the device), the first block of every segment, positions."""
    if isinstance(part, Store):
        rows, blocks = part.layout
        return part.keys, part.values, rows.to(device), blocks, part.positions
    batch, heads, count = part.keys.shape[:3]
    segments, per_segment = batch * heads, -(-count // BLOCK)
    blocks = torch.arange(segments + 1) * per_segment
    block = torch.arange(per_segment) * BLOCK
    rows = F.pad((torch.arange(segments)[:, None] * count + block).flatten(), (0, 1), value=segments * count)
    keys, values = (DenseRows(side.reshape(-1, side.shape[-1])) for side in (part.keys, part.values))
    return keys, values, rows.to(device), blocks, part.positions.flatten()
