"""Decode attention on a CPU, by the compiled kernel."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from secateur.cache.kernels.compiler import compiled
from secateur.cache.kernels.problem import Problem, Rectangle
from secateur.cache.rows import DenseRows, Rows, ThinRows
from secateur.cache.store import Store
from secateur.cache.tiles import LANES, BitmapRows

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


# The structs of attention.cpp, field by field.


class _Side(Structure):
    _fields_ = [
        *((name, c_int32) for name in ("kind", "width", "stored", "tiles")),
        ("x", c_void_p),
        ("size", c_int64),
        *((name, c_void_p) for name in ("bits", "starts", "channels")),
    ]


class _Part(Structure):
    _fields_ = [
        ("keys", _Side),
        ("values", _Side),
        *((name, c_void_p) for name in ("rows", "blocks", "positions")),
        ("length", c_int64),
    ]


_SIZES = ("batch", "heads", "kv_heads", "tokens", "key_width", "value_width", "dtype", "threads")


class _Problem(Structure):
    _fields_ = [
        *((name, c_int32) for name in _SIZES),
        *((name, c_float) for name in ("scaling", "softcap")),
        *((name, c_void_p) for name in ("query", "query16", "out", "mask")),
        ("mask_kind", c_int32),
        ("causal", c_int32),
        *((name, c_int64) for name in ("mask_batch", "mask_token", "first")),
    ]


@cache
def library() -> ctypes.CDLL:
    """The compiled kernel. Raises CompilationError."""
    found = compiled()
    found.attend.argtypes = [POINTER(_Problem), POINTER(_Part), c_int32]
    found.attend.restype = None
    found.built_for.restype = ctypes.c_char_p
    return found


def attend(problem: Problem) -> Tensor:
    """softmax(scaling * q.k) v over all parts, [B, T, H, E] in the query's dtype."""
    query = problem.query
    batch, heads, tokens, width = query.shape
    value_width = problem.value_width
    # coefficients are read as vectors and in pairs
    padded = F.pad(query, (0, -width % LANES)).contiguous()
    plain = padded.float()
    out = torch.empty(batch, tokens, heads, value_width, dtype=torch.float32)
    mask, mask_kind = _mask(problem.mask)
    # positions are looked at until the kernel returns
    positions = [
        part.positions.to(torch.int32).contiguous() if isinstance(part, Rectangle) and problem.needs_positions else None
        for part in problem.parts
    ]
    parts = [
        _store(part) if isinstance(part, Store) else _rectangle(part, own)
        for part, own in zip(problem.parts, positions, strict=True)
    ]
    call = _Problem(
        batch=batch,
        heads=heads,
        kv_heads=problem.kv_heads,
        tokens=tokens,
        key_width=width,
        value_width=value_width,
        dtype=DTYPES[query.dtype],
        threads=torch.get_num_threads(),
        scaling=problem.scaling,
        softcap=problem.softcap or 0.0,
        query=plain.data_ptr(),
        query16=padded.data_ptr() if query.dtype == torch.bfloat16 else None,
        out=out.data_ptr(),
        mask=None if mask is None else mask.data_ptr(),
        mask_kind=mask_kind,
        causal=problem.is_causal,
        # a mask may be the same for all sequences or all new tokens
        mask_batch=0 if mask is None or mask.shape[0] == 1 else mask.stride(0),
        mask_token=0 if mask is None or mask.shape[1] == 1 else mask.stride(1),
        first=problem.seen - tokens,
    )
    library().attend(ctypes.byref(call), (_Part * len(parts))(*parts), len(parts))
    return out.to(query.dtype)


def _mask(mask: Tensor | None) -> tuple[Tensor | None, int]:
    if mask is None:
        return None, 0
    return (mask.contiguous(), 1) if mask.dtype == torch.bool else (mask.float().contiguous(), 2)


def _rectangle(part: Rectangle, positions: Tensor | None) -> _Part:
    keys, values = part.keys, part.values
    return _Part(
        keys=_side(DenseRows(keys.view(-1, keys.shape[-1]))),
        values=_side(DenseRows(values.view(-1, values.shape[-1]))),
        positions=None if positions is None else positions.data_ptr(),
        length=keys.shape[2],
    )


def _store(store: Store) -> _Part:
    rows, blocks = store.layout
    return _Part(
        keys=_side(store.keys),
        values=_side(store.values),
        rows=rows.data_ptr(),
        blocks=blocks.data_ptr(),
        positions=None if store.positions is None else store.positions.data_ptr(),
    )


def _side(rows: Rows) -> _Side:
    if isinstance(rows, BitmapRows):
        return _Side(
            kind=2,
            width=rows.width,
            tiles=rows.bits.shape[1],
            x=rows.values.data_ptr(),
            size=rows.values.numel(),
            bits=rows.bits.data_ptr(),
            starts=rows.starts.data_ptr(),
        )
    if isinstance(rows, ThinRows):
        stored, channels = rows.x.shape[-1], rows.channels.data_ptr()
        return _Side(kind=1, width=rows.width, stored=stored, x=rows.x.data_ptr(), channels=channels)
    assert isinstance(rows, DenseRows)
    return _Side(kind=0, width=rows.x.shape[-1], stored=rows.x.shape[-1], x=rows.x.data_ptr())
