"""Processes forked from one that has imported what is heavy: starting them afresh takes longer than what they do."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import TextIO

PRELOADED = [
    "pytest",
    "accelerate",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "transformers.models.llama.modeling_llama",
    "secateur.cli.app",
    "secateur.runs.run",
    "secateur.train.sharding",
]
WAIT = 120


def preload() -> None:
    """To be called before anything is forked; a session has one process to fork from."""
    multiprocessing.set_forkserver_preload(PRELOADED)


class Forked:
    """``secateur`` with these arguments in a process of its own, much as ``subprocess.Popen`` would run it.

    ``before`` is called there first, to replace what the test needs otherwise; it must be importable by its own name,
    so it lives in a file at the top of ``tests/``. SIGINT interrupts, also where a shell has put the tests into the
    background. A context manager, at whose end the process is gone.
    """

    def __init__(
        self,
        arguments: Sequence[object],
        *,
        before: Callable[[], None] | None = None,
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        preload()
        context = multiprocessing.get_context("forkserver")
        pipes = [context.Pipe(duplex=False) for _ in range(2)]
        words, folder = [str(a) for a in arguments], str(cwd or Path.cwd())
        ends = [writer for _, writer in pipes]
        self._process = context.Process(target=_main, args=(words, before, folder, dict(environment or {}), *ends))
        self._process.start()
        for writer in ends:
            writer.close()
        self.stdout, self.stderr = (_text(reader) for reader, _ in pipes)

    def send_signal(self, number: int) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def wait(self) -> int:
        """The exit code."""
        self._process.join(WAIT)
        assert self._process.exitcode is not None, "the process hasn't ended"
        return self._process.exitcode

    def __enter__(self) -> Forked:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.join()
        for stream in (self.stdout, self.stderr):
            stream.close()


def _text(reader: Connection) -> TextIO:
    made = os.fdopen(os.dup(reader.fileno()), encoding="utf8")
    reader.close()
    return made


def _main(
    arguments: list[str],
    before: Callable[[], None] | None,
    cwd: str,
    environment: dict[str, str],
    stdout: Connection,
    stderr: Connection,
) -> None:
    import torch

    torch.set_num_threads(1)
    for number, stream in ((1, stdout), (2, stderr)):
        os.dup2(stream.fileno(), number)
        stream.close()
    # those of the process that was forked may be buffered otherwise
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, encoding="utf8", closefd=False) for n in (1, 2))
    os.chdir(cwd)
    os.environ.update(environment, OMP_NUM_THREADS="1")
    # tests look at what is left in folders, and a plugin isn't to leave its bytecode there
    tempfile.tempdir, sys.dont_write_bytecode = None, True
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if before is not None:
        before()
    from secateur.cli import main

    main(arguments)
