"""Taking time: the same work several times over, taking turns with what it is compared with."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

Step = Callable[[int], None]
"""Called with the number of rounds that are done."""


def now(device: torch.device) -> float:
    """Seconds on a clock that only runs forwards, once everything asked of ``device`` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
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
