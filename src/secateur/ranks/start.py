"""Finding the other ranks, and leaving them: torchrun's environment, or a process group that is there already."""

from __future__ import annotations

import atexit
import os
import sys
import time
from contextlib import suppress
from datetime import timedelta

from secateur.errors import RankError, UsageError, first_line
from secateur.ranks.base import ALONE, Ranks

_START = timedelta(minutes=10)
# seconds that a rank which fails before it has met the others gives rank 0 to fail as well
_SILENCE = 10.0


def join() -> Ranks:
    """The ranks of this process, which enters their process group if that hasn't been done: all must call this.

    Without torchrun's environment and without a process group it is alone. Raises UsageError when the environment is
    incomplete, and RankError when the ranks don't find each other.
    """
    size, rank = number("WORLD_SIZE", 1), number("RANK", 0)
    import torch.distributed as dist

    if not dist.is_available():
        return ALONE
    if not dist.is_initialized():
        if size == 1 or "RANK" not in os.environ:
            return ALONE
        _enter(rank, size)
    if dist.get_world_size() == 1:
        return ALONE
    from secateur.ranks.group import group_of

    return group_of(dist.group.WORLD)


def started_as_main() -> bool:
    """False when the environment says that this process is one of several ranks, and not the first."""
    with suppress(UsageError):
        return number("WORLD_SIZE", 1) == 1 or number("RANK", 0) == 0
    return True


def wait_for_main() -> None:
    """Before a rank that isn't the first leaves with an error: torchrun ends all ranks as soon as one has failed, and
    rank 0, which says why, may be the last to get there. Ranks that have met take leave of each other at their exit."""
    dist = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_available() or not dist.is_initialized():
        time.sleep(_SILENCE)


def number(name: str, otherwise: int) -> int:
    text = os.environ.get(name, str(otherwise))
    if not text.isdecimal():
        raise UsageError(f"{name} in the environment must be a number, got {text!r}: start the ranks with torchrun")
    return int(text)


def _enter(rank: int, size: int) -> None:
    import torch
    import torch.distributed as dist

    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing or rank >= size:
        wrong = f"{missing[0]} is missing" if missing else f"RANK {rank} is not below WORLD_SIZE {size}"
        raise UsageError(f"{wrong} in the environment of rank {rank}: start the ranks with torchrun")
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    try:
        dist.init_process_group(backend, timeout=_START)
    except (RuntimeError, ValueError) as error:
        raise RankError(f"rank {rank} of {size} doesn't find the others: {first_line(error)}") from error
    atexit.register(_leave)


def _leave() -> None:
    """Leave the group that was entered here, all ranks at once: torchrun ends the others as soon as one has failed,
    and rank 0 must have said why by then."""
    import torch.distributed as dist

    from secateur.ranks.group import group_of

    if dist.is_initialized():
        with suppress(RuntimeError):
            group_of(dist.group.WORLD).say_farewell()
        with suppress(RuntimeError):
            dist.destroy_process_group()
