"""Hidden states on their way through the blocks: in memory, or in a file when they are larger than that."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from secateur.tensorfiles import Made, read_header, write_tensors


class Activations:
    """The hidden states of all calibration batches, [sequences, length, hidden] each.

    They stay in memory until they take more than ``limit`` bytes, and go to a memory-mapped file in ``folder`` (by
    default a temporary one) from then on. What is set during one pass over the batches replaces what is there only
    with ``turn``; a file that has been stored is never written to again.
    """

    def __init__(self, *, limit: int | None = None, folder: Path | None = None) -> None:
        self._limit, self._folder = limit, folder
        self._memory: list[Tensor] = []
        self._places: list[tuple[int, tuple[int, ...], torch.dtype, torch.device]] = []
        self._bytes = 0
        self._spilled = False

    def another(self, name: str = "", parts: int = 1) -> Activations:
        """Empty ones with the same limit, in a folder ``name`` within this one's; without, in its very place.

        Of several ``parts`` that are there together each has its share of the limit.
        """
        folder = None if self._folder is None else self._folder / name
        if folder is not None:
            folder.mkdir(exist_ok=True)
        return Activations(limit=None if self._limit is None else self._limit // parts, folder=folder)

    def elsewhere(self, folder: Path | None) -> Activations:
        """Empty ones with the same limit, which go to another folder."""
        return Activations(limit=self._limit, folder=folder)

    def append(self, hidden: Tensor) -> None:
        """Add a batch, before the first pass."""
        size = hidden.numel() * hidden.element_size()
        self._places.append((self._bytes, tuple(hidden.shape), hidden.dtype, hidden.device))
        self._bytes += size
        if self._limit is not None and self._bytes > self._limit and not self._spilled:
            self._spill()
        if self._spilled:
            self._map(self._current, len(self._places) - 1)[:] = _raw(hidden)
        else:
            self._memory.append(hidden)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, batch: int) -> Tensor:
        if not self._spilled:
            return self._memory[batch]
        _, shape, dtype, device = self._places[batch]
        raw = np.array(self._map(self._current, batch, "r"))
        return torch.from_numpy(raw).view(dtype).reshape(shape).to(device)

    def __setitem__(self, batch: int, hidden: Tensor) -> None:
        if self._spilled:
            self._map(self._next, batch)[:] = _raw(hidden)
        else:
            self._memory[batch] = hidden

    def turn(self) -> None:
        """End a pass: what was set is what the next one gets."""
        if self._spilled:
            os.replace(self._next, self._current)

    def store(self, path: Path) -> None:
        """Keep a copy of the present state on disk, durable when this returns."""
        states = {
            # read one batch at a time: together they may be more than memory holds
            f"{batch:06d}": Made(dtype, shape, partial(self.__getitem__, batch))
            for batch, (_, shape, dtype, _) in enumerate(self._places)
        }
        write_tensors(path, states, durable=True)

    def restore(self, path: Path) -> None:
        """Go back to a state that was stored from the same batches."""
        stored = read_header(path)
        for i in range(len(self)):
            self[i] = stored[f"{i:06d}"].read().to(self._places[i][3])
        self.turn()

    @property
    def spilled(self) -> bool:
        """True when the states lie in a file."""
        return self._spilled

    def _spill(self) -> None:
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="secateur-"))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._spilled = True
        for batch, hidden in enumerate(self._memory):
            self._map(self._current, batch)[:] = _raw(hidden)
        self._memory = []

    @property
    def _current(self) -> Path:
        assert self._folder is not None
        return self._folder / "hidden.bin"

    @property
    def _next(self) -> Path:
        assert self._folder is not None
        return self._folder / "hidden-next.bin"

    def _map(self, path: Path, batch: int, mode: str = "r+") -> np.ndarray:
        start, shape, dtype, _ = self._places[batch]
        size = int(np.prod(shape)) * dtype.itemsize
        if mode != "r" and (not path.exists() or path.stat().st_size < start + size):
            with open(path, "ab") as file:
                file.truncate(max(start + size, self._bytes))
        return np.memmap(path, dtype=np.uint8, mode=mode, offset=start, shape=(size,))  # type: ignore[call-overload]


def _raw(hidden: Tensor) -> np.ndarray:
    return hidden.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
