"""Commands as separate processes: wall time and peak memory of each."""

from __future__ import annotations

import os
import resource
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Run:
    """One process from start to exit: wall and processor time, and the kernel's high-water mark of resident memory."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int


def measured(command: Sequence[str], *, log: Path, environment: Mapping[str, str]) -> Run:
    """Run ``command`` with its output in ``log``. Raises RuntimeError with the end of the log when it fails.

    The memory is the child's own only above ``own_peak_bytes()``: the kernel's mark starts at what the caller had.
    """
    with log.open("wb") as sink:
        start = time.perf_counter()
        child = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT, env=dict(environment))
        # the usage of this child alone; RUSAGE_CHILDREN is the largest of all children so far
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        tail = "\n".join(log.read_text(encoding="utf8", errors="replace").splitlines()[-15:])
        raise RuntimeError(f"{' '.join(command)} ended with {child.returncode}:\n{tail}")
    return Run(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def own_peak_bytes() -> int:
    """The high-water mark of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
