"""How much memory a piece of work takes in this process, which does other work before and after."""

from __future__ import annotations

import threading
from types import TracebackType

import psutil
import torch

SECONDS_BETWEEN_LOOKS = 0.01


class PeakMemory:
    """The largest resident memory of this process while the context is open, in bytes.

    It is looked at a hundred times a second, since the kernel's own mark can't be set back everywhere. What the
    process held before, a model for example, is part of it. On a GPU it is the peak of torch's allocator instead.
    """

    def __init__(self, device: str = "cpu") -> None:
        self._cuda = device.startswith("cuda")
        self._device, self._process, self._over = device, psutil.Process(), threading.Event()
        self._watching = threading.Thread(target=self._watch, name="peak-memory", daemon=True)
        self.bytes = 0

    def __enter__(self) -> PeakMemory:
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            self._look()
            self._watching.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._cuda:
            self.bytes = torch.cuda.max_memory_allocated(self._device)
            return
        self._over.set()
        self._watching.join()
        self._look()

    def _watch(self) -> None:
        while not self._over.wait(SECONDS_BETWEEN_LOOKS):
            self._look()

    def _look(self) -> None:
        self.bytes = max(self.bytes, int(self._process.memory_info().rss))
