"""Processes that are killed right before one of their steps in the file system, or in the middle of writing a file."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

KILLED, FAILED = 77, 78
_STEPS = {"os.mkdir", "os.rename", "os.remove", "os.rmdir"}


def in_a_child(work: Callable[[], object]) -> int:
    """The exit code of a forked process that does this work: 0, KILLED, or FAILED with its traceback on stderr."""
    child = os.fork()
    if child == 0:
        code = FAILED
        try:
            _renew_threads()
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            # nothing of the test may run on in the child
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _renew_threads() -> None:
    """torch makes its pool of threads anew at its first use in a forked process, in which no two threads may meet."""
    torch.set_num_threads(1)


def steps_of(work: Callable[[], object], folder: Path) -> list[tuple[str, str]]:
    """What the work does to files below ``folder``, in order: (event, path). It is done in a forked process."""
    reading, writing = os.pipe()

    def watched() -> None:
        found: list[tuple[str, str]] = []
        sys.addaudithook(lambda event, given: found.extend(_steps(event, given, folder)))
        work()
        text = "\n".join("\t".join(step) for step in found)
        with os.fdopen(writing, "w") as file:
            file.write(text)

    child = os.fork()
    if child == 0:
        try:
            _renew_threads()
            watched()
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        lines = file.read().splitlines()
    os.waitpid(child, 0)
    return [(event, path) for event, _, path in (line.partition("\t") for line in lines)]


def killed_at(step: int, work: Callable[[], object], folder: Path) -> int:
    """The exit code of a process that is killed right before this step, from 0.

    A file that it would have begun to write there is left empty, as if it had died in the middle.
    """

    def dying() -> None:
        left = [step]

        def hook(event: str, given: tuple[object, ...]) -> None:
            for name, path in _steps(event, given, folder):
                if left[0] == 0:
                    left[0] = -1
                    if name == "write":
                        os.close(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC))
                    os._exit(KILLED)
                left[0] -= 1

        sys.addaudithook(hook)
        work()

    return in_a_child(dying)


def _steps(event: str, given: tuple[object, ...], folder: Path) -> Iterator[tuple[str, str]]:
    if event in _STEPS:
        name = event
    elif event == "open" and isinstance(given[2], int) and given[2] & os.O_TRUNC:
        name = "write"
    else:
        return
    path = given[0]
    if isinstance(path, bytes | str | os.PathLike):
        text = os.fsdecode(path)
        # what shutil.rmtree removes is told relative to folders that it has open
        if not os.path.isabs(text) or Path(text).is_relative_to(folder):
            yield name, text
