"""Stopping where nothing is lost: a signal is noted, and the run ends at the next boundary between blocks."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(KeyboardInterrupt):
    """The run was asked to stop and did so at a boundary; the message says how to go on."""


class StopRequest:
    """Set by SIGINT or SIGTERM. Before ``begun()`` there is nothing to lose, so a signal interrupts at once.

    So does a second signal, and any signal while ``defer(False)`` holds. ``piece`` is what work ends with.
    """

    def __init__(self, begun: Callable[[], bool] = lambda: True, *, quiet: bool = False) -> None:
        self.made = False
        self.piece = "block"
        self._quiet = quiet
        self._begun = begun
        self._deferring = True

    def defer(self, on: bool) -> None:
        """Whether signals wait for the next boundary."""
        self._deferring = on

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.made or not self._deferring or not self._begun():
            raise KeyboardInterrupt
        self.made = True
        if not self._quiet:
            _say(f"stopping after this {self.piece}; once more stops at once")


def _say(text: str) -> None:
    try:
        print(text, file=sys.stderr, flush=True)
    except RuntimeError:
        # the signal came while this stream was writing a line of its own, and it can't be entered twice
        os.write(sys.stderr.fileno(), f"{text}\n".encode())


@contextmanager
def deferred(begun: Callable[[], bool], *, quiet: bool = False) -> Iterator[StopRequest]:
    """Within the block, signals only set the request. Handlers can be changed in the main thread alone."""
    request = StopRequest(begun, quiet=quiet)
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
