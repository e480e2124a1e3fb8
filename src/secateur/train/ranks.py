"""What several ranks do together: one rank works, all learn how it went, and none is left waiting."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from secateur.errors import SecateurError, UsageError
from secateur.files import output_folder

Value = TypeVar("Value")


def check_group() -> None:
    """Raises UsageError when this process belongs to no process group."""
    if not (dist.is_available() and dist.is_initialized()):
        raise UsageError("there is no process group: start the script with torchrun or accelerate launch")


def on_main(work: Callable[[], Value]) -> Value:
    """Run ``work`` on rank 0 and give its result to all ranks, which must all call this; keep the result small.

    An error is raised on every rank: the same one when it is a SecateurError, otherwise a SecateurError elsewhere.
    """
    box: list[Any] = [None, None]
    failed: Exception | None = None
    if dist.get_rank() == 0:
        try:
            box[0] = work()
        except Exception as error:
            failed = error
            box[1] = error if isinstance(error, SecateurError) else SecateurError(f"rank 0 failed: {error}")
    dist.broadcast_object_list(box)
    if failed is not None:
        raise failed
    if box[1] is not None:
        raise box[1]
    return box[0]


@contextmanager
def shared_output(folder: str | Path, overwrite: bool = False) -> Generator[Path, None, None]:
    """``output_folder`` for all ranks together: one temporary folder on a file system that they share.

    What happens inside must succeed or fail on all ranks. Raises OutputError on every rank.
    """
    with ExitStack() as stack:
        # the path as text: what on_main hands round must not depend on the kind of machine
        temporary = Path(on_main(lambda: str(stack.enter_context(output_folder(folder, overwrite)))))
        yield temporary
        # everybody has written before the folder takes its name, and it has its name before anybody goes on
        dist.barrier()
        on_main(stack.close)
