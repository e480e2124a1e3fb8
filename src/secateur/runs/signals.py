"""Stopping where nothing is lost: a signal is noted, and the run ends at the next boundary between blocks."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(KeyboardInterrupt):
    """The run was asked to stop and did so at a boundary; the message says how to go on."""


class StopRequest:
    """Set once SIGINT or SIGTERM has come; a second signal interrupts at once."""

    def __init__(self) -> None:
        self.made = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.made:
            raise KeyboardInterrupt
        self.made = True


@contextmanager
def deferred() -> Iterator[StopRequest]:
    """Within the block, signals only set the request. Handlers can be changed in the main thread alone."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.signal(number, request) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
