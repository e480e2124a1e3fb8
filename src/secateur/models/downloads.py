"""The bytes of a download as progress of ours, in place of the bars that ``huggingface_hub`` draws."""

from __future__ import annotations

import threading
from collections.abc import Callable

_MIB = 2**20


def bar_class(progress: Callable[[str, int, int], None] | None) -> type:
    """A stand-in for tqdm that draws nothing and calls ``progress`` with ("download", MiB done, MiB in all).

    Files come in several threads, and every one of them reports: calls are made one at a time and never go back.
    """
    from huggingface_hub.utils import tqdm

    lock = threading.Lock()
    bars: list[SilentBar] = []
    reported = [0]

    class SilentBar(tqdm):
        def __init__(self, *arguments, **options) -> None:
            super().__init__(*arguments, **{**options, "disable": True})
            self.total = options.get("total")
            if options.get("unit") == "B":
                bars.append(self)

        def update(self, n: float | None = 1) -> None:
            with lock:
                # a bar that draws nothing doesn't count either
                self.n += n or 0
                if progress is None or self not in bars:
                    return
                # bytes from the network and bytes on disk are bars of their own: the one that is ahead counts
                total = max(int(bar.total or 0) for bar in bars)
                done = max(reported[0], *(int(bar.n) for bar in bars))
                if total and (done // _MIB > reported[0] // _MIB or done >= total > reported[0]):
                    reported[0] = done
                    whole = max(1, -(-total // _MIB))
                    progress("download", whole if done >= total else min(done // _MIB, whole), whole)

    return SilentBar
