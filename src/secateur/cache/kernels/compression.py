"""Compression of keys and values on a CPU, by the compiled kernel: which elements stay, and their tiles.

Everywhere else plain torch does the same (``Largest.mask``, ``BitmapRows.encode``), bit by bit.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_int32, c_int64, c_uint32, c_void_p
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from secateur.cache.kernels import WIDEST, switched_off
from secateur.cache.kernels.compiler import CompilationError
from secateur.cache.kernels.cpu import library
from secateur.methods.elements import Largest

_INFINITY = {torch.float32: 0x7F800000, torch.bfloat16: 0x7F80, torch.float16: 0x7C00}


# The structs of compression.cpp, field by field.


class _Sizes(Structure):
    _fields_ = [
        ("x", c_void_p),
        ("sizes", c_int64 * 4),
        ("strides", c_int64 * 4),
        *((name, c_int32) for name in ("kept", "ties")),
        ("infinity", c_uint32),
        *((name, c_int32) for name in ("item", "threads")),
    ]


class _Encoding(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("dense", "rows")),
        ("blocks", c_int64),
        *((name, c_int32) for name in ("width", "tiles", "by_channel", "item", "threads")),
        *((name, c_void_p) for name in ("bits", "starts", "values")),
    ]


@cache
def _library() -> ctypes.CDLL | None:
    """None without a compiler, about which attention warns; slower compression is the smaller part of it."""
    try:
        found = library()
    except CompilationError:
        return None
    found.keep_largest.argtypes = [POINTER(_Sizes)]
    for encode in (found.encode_words, found.encode_elements):
        encode.argtypes = [POINTER(_Encoding)]
    for function in (found.keep_largest, found.encode_words, found.encode_elements):
        function.restype = None
    return found


def takes(x: Tensor) -> bool:
    """Whether there is a kernel for such a tensor, [..., E]. Raises UsageError for a wrong switch."""
    off = switched_off()
    return not off and x.device.type == "cpu" and x.dtype in _INFINITY and _library() is not None


def keep_largest(x: Tensor, rule: Largest) -> bool:
    """Zero all elements of ``x`` [..., E] in place but those that stay; whether there is a kernel that does."""
    if not takes(x) or x.dim() > 4 or x.shape[-1] > WIDEST:
        return False
    missing = 4 - x.dim()
    call = _Sizes(
        x=x.data_ptr(),
        sizes=(c_int64 * 4)(*[1] * missing, *x.shape),
        strides=(c_int64 * 4)(*[0] * missing, *x.stride()),
        kept=rule.count,
        ties=rule.ties,
        infinity=_INFINITY[x.dtype],
        item=x.element_size(),
        threads=torch.get_num_threads(),
    )
    found = _library()
    assert found is not None
    if x.numel():
        found.keep_largest(ctypes.byref(call))
    return True


def encode(dense: Tensor, counts: Tensor, tiles: int, by_channel: bool) -> tuple[Tensor, Tensor, Tensor] | None:
    """``bits``, ``values`` and ``starts`` of ``dense`` [N, E] in blocks of ``counts`` rows; None without a kernel."""
    if not takes(dense):
        return None
    dense, rows = dense.contiguous(), F.pad(counts.cumsum(0), (1, 0))
    bits = torch.empty(len(counts), tiles, dtype=torch.int64)
    kept = torch.empty(len(counts), dtype=torch.int64)
    call = _Encoding(
        dense=dense.data_ptr(),
        rows=rows.data_ptr(),
        blocks=len(counts),
        width=dense.shape[-1],
        tiles=tiles,
        by_channel=by_channel,
        item=dense.element_size(),
        threads=torch.get_num_threads(),
        bits=bits.data_ptr(),
        starts=kept.data_ptr(),
    )
    found = _library()
    assert found is not None
    found.encode_words(ctypes.byref(call))
    starts = kept.cumsum(0) - kept
    values = dense.new_empty(int(kept.sum()))
    call.starts, call.values = starts.data_ptr(), values.data_ptr()
    found.encode_elements(ctypes.byref(call))
    return bits, values, starts
