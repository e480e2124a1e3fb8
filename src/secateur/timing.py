"""Taking time: the same work several times over, taking turns with what it is compared with."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from secateur.errors import OptionError, nearest

if TYPE_CHECKING:
    import torch

Step = Callable[[int], None]
"""Called with the number of rounds that are done."""


def wait(device: torch.device) -> None:
    """Until everything that was asked of ``device`` is done."""
    if device.type not in ("cpu", "meta"):
        # here, since the command line knows workloads without torch
        import torch

        torch.accelerator.synchronize(device)


def now(device: torch.device) -> float:
    """Seconds on a clock that only runs forwards, once everything asked of ``device`` is done."""
    wait(device)
    return time.perf_counter()


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """How long ``work`` takes on ``device``."""
    start = now(device)
    work()
    return now(device) - start


def take_turns(
    works: Mapping[str, Callable[[], object]],
    repeats: int,
    devices: Mapping[str, torch.device],
    step: Step = lambda done: None,
) -> dict[str, list[float]]:
    """Seconds of every repeat of every work, by name.

    A round does each work once, so that a machine that slows down or warms up meets all of them alike. The first round
    warms up and is not counted.
    """
    times: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(-1, repeats):
        for name, work in works.items():
            taken = seconds(work, devices[name])
            if repeat >= 0:
                times[name].append(taken)
        step(repeat + 2)
    return times


_MUCH = 0.1
"""of the time for which threads were ready to run"""
PAIRED = ", changes are medians of the ratios of each repeat"
"""what the protocol of several models says that were timed in turns"""
BUSY = "while other processes had the processors for part of the time"
"""what the protocol of a measurement says on a machine that wasn't quiet"""


@dataclass
class Watched:
    """What else a machine did while time was taken on it; ``waited`` is known at the end, and 0 off Linux.

    It is the fraction of the time for which threads of this process waited for a processor that another one had.
    """

    waited: float = 0.0

    @property
    def about(self) -> str:
        """What a protocol says of it: nothing on a quiet machine."""
        return f", {BUSY}" if self.waited > _MUCH else ""


@contextmanager
def watched() -> Iterator[Watched]:
    """Looks at how long this process waits for processors meanwhile."""
    machine, before = Watched(), ran_and_waited()
    yield machine
    ran, waited = (max(after - first, 0) for after, first in zip(ran_and_waited(), before, strict=True))
    machine.waited = waited / (ran + waited) if waited else 0.0


def ran_and_waited() -> tuple[int, int]:
    """Nanoseconds for which the threads of this process have run, and waited until they could, as Linux counts."""
    ran = waited = 0
    for file in Path("/proc/self/task").glob("*/schedstat"):
        try:
            mine = file.read_text().split()
            ran, waited = ran + int(mine[0]), waited + int(mine[1])
        except (OSError, ValueError, IndexError):
            # a thread has ended, or the system doesn't count
            continue
    return ran, waited


@dataclass(frozen=True)
class Workload:
    """A request to a language model: ``batch`` sequences of ``prompt`` tokens, to which ``new`` tokens are written."""

    batch: int = 1
    prompt: int = 256
    new: int = 32

    @classmethod
    def parse(cls, text: str) -> Workload:
        """From ``batch=1,prompt=256,new=32``, any of which may be left out. Raises OptionError."""
        known = [field.name for field in fields(cls)]
        found: dict[str, int] = {}
        for part in text.split(",") if text else ():
            name, _, value = (piece.strip() for piece in part.partition("="))
            if name not in known:
                raise OptionError(f"a workload is made of {', '.join(known)}, got {name!r}{nearest(name, known)}")
            least = 0 if name == "new" else 1
            if not value.isdecimal() or int(value) < least:
                raise OptionError(f"workload {name} must be a whole number of at least {least}, got {value!r}")
            found[name] = int(value)
        return cls(**found)

    def __str__(self) -> str:
        return ",".join(f"{name}={value}" for name, value in asdict(self).items())
