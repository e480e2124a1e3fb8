"""Memory: what of it there is, and what was freed, kept for what comes next within a block and given back after it."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import psutil

# glibc's mallopt: what it moves by itself, and the most it moves them to
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_MOST_MMAP = 32 << 20
# whoever set these has other wishes
TOLD = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
_GROUPS = Path("/sys/fs/cgroup")
# limit, what is used, and what of that is what, in versions 2 and 1
_CONTROL_GROUPS = (
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
)


def available_memory() -> int:
    """Bytes that can still be taken without swapping; less where a control group sets a limit."""
    free = psutil.virtual_memory().available
    for limit, used, statistics in _CONTROL_GROUPS:
        with suppress(OSError, ValueError):
            # "max", where there is no limit, is no number
            left = int((_GROUPS / limit).read_text()) - int((_GROUPS / used).read_text())
            entries = (line.split() for line in (_GROUPS / statistics).read_text().splitlines())
            # files that were read count as used until something else needs the place
            left += sum(int(size) for name, size in entries if name in ("active_file", "inactive_file"))
            free = min(free, left)
    return max(free, 0)


@cache
def reuse() -> None:
    """Let the C library keep up to 64 MB that were freed; does nothing where it can't (other libraries than glibc).

    Left alone, it gives tensors of some megabytes back as soon as they are freed, and every page of the next one is
    fetched and zeroed anew, which is a tenth of the time of a block on CPUs. Its own adjustment ends at these values
    when a tensor of 32 MB has been freed.
    """
    if (tell := _function("mallopt")) is not None and not any(name in os.environ for name in TOLD):
        tell(_MMAP_THRESHOLD, _MOST_MMAP)
        tell(_TRIM_THRESHOLD, 2 * _MOST_MMAP)


def trim() -> None:
    """Return the free pages of the C library's heaps; does nothing where it can't (other libraries than glibc).

    Tensors that come and go block by block leave holes in heaps, which grow over a run without it.
    """
    if (release := _function("malloc_trim")) is not None:
        release(0)


@cache
def _function(name: str) -> Any:
    """A function of the C library by name; None where there is no such library or function."""
    try:
        return getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):
        return None
