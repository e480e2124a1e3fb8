"""Running a function on several CPU ranks: each a process of its own, all in one gloo group."""

from __future__ import annotations

import faulthandler
import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from forking import preload


def run_ranks(job: Callable[..., None], world: int, *arguments: Any) -> None:
    """Call ``job(rank, *arguments)`` on ``world`` ranks and wait; an error of any rank is raised here.

    ``job`` must be importable by its own name, so it lives in a file at the top of ``tests/``.
    """
    import torch.multiprocessing

    preload()
    # they meet in a file: a free port may be taken meanwhile, and a store within rank 0 is gone when that ends first
    with tempfile.TemporaryDirectory() as folder:
        started = (job, world, f"file://{folder}/store", *arguments)
        torch.multiprocessing.start_processes(_start, started, nprocs=world, start_method="forkserver")


def _start(rank: int, job: Callable[..., None], world: int, meeting: str, *arguments: Any) -> None:
    import torch
    import torch.distributed as dist

    # a signal that kills a rank says nothing of where
    faulthandler.enable()
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_WORLD_SIZE=str(world),
        OMP_NUM_THREADS="1",
    )
    # a rank that waits for one that died must not wait for half an hour
    patience = timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world, timeout=patience)
    job(rank, *arguments)
    dist.barrier()
    # gloo's threads are now and then torn down in an order that aborts a process whose work is done
    os._exit(0)


def on_disk(folder: Path) -> list[str]:
    """What a folder holds, hidden files as well."""
    return sorted(path.name for path in folder.iterdir())
