"""Decode attention over the mixed store of a compressed cache, without expanding it in memory.

What computes it depends on where the cache lies: a kernel that is compiled for this processor (``cpu``), or one of
Triton (``gpu``). Where neither can, the reference in plain torch does, and a warning says so once.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from secateur.cache.kernels.problem import Problem, Rectangle
from secateur.errors import SecateurError, UsageError

__all__ = ["Problem", "Rectangle", "kernel_for"]

MOST_TOKENS = 16
"""new tokens beyond which it is faster to expand the cache once for all of them"""
WIDEST = 256
"""channels of the widest head that a kernel takes"""
SWITCH = "SECATEUR_KERNELS"
"""environment variable: ``auto``, or ``torch`` for the reference"""
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Kernel = Callable[[Problem], Tensor]


def kernel_for(problem: Problem) -> Kernel | None:
    """What computes this faster than the reference; None where nothing does. Raises UsageError for a wrong switch."""
    query = problem.query
    if switched_off() or query.shape[2] > MOST_TOKENS or (torch.is_grad_enabled() and query.requires_grad):
        return None
    width = max(query.shape[-1], problem.value_width)
    if query.dtype not in _DTYPES or problem.dtypes != {query.dtype}:
        return _fall_back(f"for {' and '.join(sorted(str(d)[6:] for d in problem.dtypes | {query.dtype}))}")
    if width > WIDEST:
        return _fall_back(f"for heads of {width} channels (at most {WIDEST})")
    return _of_device(query.device.type)


def switched_off() -> bool:
    """Whether plain torch is asked for. Raises UsageError for a wrong switch."""
    chosen = os.environ.get(SWITCH, "auto")
    if chosen not in ("auto", "torch"):
        raise UsageError(f"{SWITCH} must be auto or torch, got {chosen!r}")
    return chosen == "torch"


@cache
def _of_device(kind: str) -> Kernel | None:
    try:
        if kind == "cpu":
            from secateur.cache.kernels import cpu

            cpu.library()
            return cpu.attend
        if kind == "cuda":
            from secateur.cache.kernels import gpu

            return gpu.attend
    except (SecateurError, ImportError) as error:
        return _fall_back(f"here: {error}")
    return _fall_back(f"for {kind}")


@cache
def _fall_back(why: str) -> None:
    warnings.warn(
        f"attention over a compressed cache goes through plain torch, which is slower: there is no kernel {why}",
        stacklevel=2,
    )
