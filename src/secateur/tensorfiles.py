"""Safetensors files read and written piece by piece, so that no file has to fit into memory.

The library maps or reads whole files; here a header is read and checked without touching the data, tensors come one
at a time or in parts, and a file is written from tensors that are made, or copied out of other files, only when their
turn comes. What is written equals what the library would write, byte for byte.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from secateur.ahead import Task, ahead
from secateur.errors import CorruptFileError

# the library's own limit
MAX_HEADER_BYTES = 100_000_000
_PIECE_BYTES = 1 << 23

# in the library's order: tensors lie by dtype, the widest first, then by name, so that each is aligned
_TORCH_DTYPES = {
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
    "C64": "complex64",
    "F32": "float32",
    "U32": "uint32",
    "I32": "int32",
    "BF16": "bfloat16",
    "F16": "float16",
    "U16": "uint16",
    "I16": "int16",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, t) for name, t in _TORCH_DTYPES.items() if hasattr(torch, t)}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ORDER = {name: place for place, name in enumerate(DTYPES)}


@dataclass(frozen=True)
class Stored:
    """One tensor in a file: its dtype, shape, and the bytes ``[start, start + size)`` of the file."""

    file: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size: int

    def read(self) -> Tensor:
        """The whole tensor, on the CPU."""
        return self.read_flat(0, self.numel).reshape(self.shape)

    def read_flat(self, first: int, count: int) -> Tensor:
        """``count`` consecutive entries in row-major order, [count], from entry ``first`` on."""
        out = torch.empty(count, dtype=self.dtype)
        if count:
            with open(self.file, "rb", buffering=0) as file:
                file.seek(self.start + first * self.dtype.itemsize)
                _read_into(file, _bytes_of(out), self.file)
        return out

    def rows(self, first: int, count: int) -> Tensor:
        """``count`` entries of the first dimension."""
        width = math.prod(self.shape[1:])
        return self.read_flat(first * width, count * width).reshape(count, *self.shape[1:])

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def pieces(self) -> Iterator[Task[memoryview]]:
        """The raw bytes, piece by piece, each to be read."""
        most = _PIECE_BYTES // self.dtype.itemsize
        for first in range(0, self.numel, most):
            count = min(most, self.numel - first)
            yield count * self.dtype.itemsize, partial(self._raw, first, count)

    def _raw(self, first: int, count: int) -> memoryview:
        return _bytes_of(self.read_flat(first, count))


@dataclass(frozen=True)
class Made:
    """A tensor that is made when it is written: ``make()`` must give this dtype and shape."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> Made:
        return cls(tensor.dtype, tuple(tensor.shape), lambda: tensor)

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def pieces(self) -> Iterator[Task[memoryview]]:
        """The raw bytes in one piece, to be made."""
        yield self.size, self._raw

    def _raw(self) -> memoryview:
        tensor = self.make().detach().cpu().contiguous()
        if tensor.dtype != self.dtype or tuple(tensor.shape) != self.shape:
            raise RuntimeError(f"promised {self.dtype} {self.shape}, made {tensor.dtype} {tuple(tensor.shape)}")
        return _bytes_of(tensor)


Source = Stored | Made


def read_header(path: str | Path) -> dict[str, Stored]:
    """Every tensor of a safetensors file by name, from its header alone; offsets, shapes and sizes are checked.

    Raises CorruptFileError for anything that is not a whole and consistent file.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            total = os.fstat(file.fileno()).st_size
            raw = _header_bytes(file, total)
        header = json.loads(raw, object_pairs_hook=_unique_keys)
        if not isinstance(header, dict):
            raise ValueError("its header is no mapping")
        header.pop("__metadata__", None)
        start = 8 + len(raw)
        found = {name: _entry(path, name, entry, start) for name, entry in header.items()}
        _check_layout(found, start, total)
    except OSError as error:
        raise CorruptFileError(f"can't read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        reason = str(error) if type(error) is ValueError else "its header is not valid JSON"
        raise CorruptFileError(f"{path} is corrupt or cut short: {reason}") from None
    return found


def _header_bytes(file: BinaryIO, total: int) -> bytes:
    if total < 8:
        raise ValueError(f"it has {total} bytes")
    length = struct.unpack("<Q", file.read(8))[0]
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"its header claims {length} bytes, more than the format allows")
    if 8 + length > total:
        raise ValueError(f"its header claims {length} bytes, the file has {total}")
    return file.read(length)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("its header holds a name twice")
    return found


def _entry(path: Path, name: str, entry: Any, start: int) -> Stored:
    if not isinstance(entry, dict):
        raise ValueError(f"the entry of {name!r} is no mapping")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    shape, offsets = _naturals(name, shape), _naturals(name, offsets)
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{name!r} has the unknown dtype {dtype!r}")
    if len(offsets) != 2:
        raise ValueError(f"{name!r} has no valid shape and offsets")
    size = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != size:
        raise ValueError(f"{name!r} of shape {shape} takes {size} bytes, its offsets say {offsets[1] - offsets[0]}")
    return Stored(path, name, DTYPES[dtype], tuple(shape), start + offsets[0], size)


def _naturals(name: str, values: Any) -> list[int]:
    if isinstance(values, list) and all(type(v) is int and 0 <= v < 1 << 63 for v in values):
        return values
    raise ValueError(f"{name!r} has no valid shape and offsets")


def _bytes_of(tensor: Tensor) -> memoryview:
    raw: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(raw)


def _check_layout(found: Mapping[str, Stored], start: int, total: int) -> None:
    """Tensors lie one after the other and fill the file: no byte belongs to two of them, none to nobody."""
    end = start
    for stored in sorted(found.values(), key=lambda s: (s.start, s.size)):
        if stored.start != end:
            raise ValueError(f"{stored.name!r} does not begin where the tensor before it ends")
        end += stored.size
    if end != total:
        raise ValueError(f"its tensors end at byte {end}, the file has {total}")


class Tally:
    """What is known of a file from writing it: its SHA-256, and how many entries of its floating tensors are zero."""

    def __init__(self) -> None:
        self.zeros: dict[str, int] = {}
        self._hash = hashlib.sha256()

    @property
    def sha256(self) -> str:
        """The hash of what was written so far, as hexadecimal digits."""
        return self._hash.hexdigest()

    def add(self, raw: bytes | memoryview) -> None:
        """The next bytes of the file."""
        self._hash.update(raw)

    def count(self, name: str, dtype: torch.dtype, raw: memoryview) -> None:
        """The next bytes of a tensor."""
        # eight bits are no weights of ours, and torch doesn't count them
        if dtype.is_floating_point and dtype.itemsize > 1 and len(raw):
            entries = torch.frombuffer(raw, dtype=dtype)
            self.zeros[name] = self.zeros.get(name, 0) + count_zeros(entries)


def count_zeros(tensor: Tensor) -> int:
    """How many entries are zero."""
    return tensor.numel() - int(torch.count_nonzero(tensor))


def in_order(sources: Mapping[str, Source]) -> list[str]:
    """The names of tensors in the order in which a file holds them."""
    return sorted(sources, key=lambda name: (_ORDER[NAMES[sources[name].dtype]], name))


def write_tensors(
    path: str | Path, tensors: Mapping[str, Source | Tensor], *, durable: bool = False, tally: Tally | None = None
) -> int:
    """Write a safetensors file; returns its size in bytes. Tensors are made or copied one at a time.

    While one is written, those after it are made or read in the background. With ``durable`` the bytes are on the disk
    when this returns. ``tally`` sees all that is written. Raises OSError.
    """
    sources = {n: Made.of(t) if isinstance(t, Tensor) else t for n, t in tensors.items()}
    order = in_order(sources)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        source, begin = sources[name], end
        end += source.size
        header[name] = {"dtype": NAMES[source.dtype], "shape": list(source.shape), "data_offsets": [begin, end]}
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    with open(path, "wb", buffering=0) as file:
        head = struct.pack("<Q", len(raw)) + raw
        _write(file, head)
        if tally is not None:
            tally.add(head)
        pieces = [(name, piece) for name in order for piece in sources[name].pieces()]
        for (name, _), piece in zip(pieces, ahead(task for _, task in pieces), strict=True):
            _write(file, piece)
            if tally is not None:
                tally.add(piece)
                tally.count(name, sources[name].dtype, piece)
        if durable:
            os.fsync(file.fileno())
    return 8 + len(raw) + end


def _write(file: Any, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while len(view):
        view = view[file.write(view) :]


def _read_into(file: Any, view: memoryview, path: Path) -> None:
    while len(view):
        count = file.readinto(view)
        if not count:
            raise CorruptFileError(f"{path} is cut short: it ended in the middle of a tensor")
        view = view[count:]


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name; a tied tensor appears once, under its first name."""
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    seen = {id(t) for t in tensors.values()}
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(prefix=prefix, recurse=False):
            transient = name.rpartition(".")[2] in module._non_persistent_buffers_set
            if not transient and id(buffer) not in seen:
                seen.add(id(buffer))
                tensors[name] = buffer
    return tensors
