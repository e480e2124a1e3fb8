"""Giving memory that was freed back to the system."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any


def trim() -> None:
    """Return the free pages of the C library's heaps; does nothing where it can't (other libraries than glibc).

    Tensors that come and go block by block leave holes in heaps, which grow over a run without it.
    """
    if (release := _release()) is not None:
        release(0)


@cache
def _release() -> Any:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
