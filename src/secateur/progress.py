"""Progress on stderr: a bar with the time left on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """A context manager that is also the callback ``progress(stage, done, total)`` of the public functions.

    On a terminal every stage is a bar with its time left; otherwise a stage writes a line at most every ten seconds
    and one when it ends. ``quiet`` writes nothing. Only ``stream`` (stderr by default) is ever written to.
    ``clock`` gives seconds; ``total`` 0 means that the number of steps is unknown.
    """

    def __init__(
        self, *, quiet: bool = False, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._quiet = quiet
        self._clock = clock
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        self._stage: str | None = None
        self._done = 0
        self._started = self._last_call = self._last_line = clock()

    def __enter__(self) -> Progress:
        if not self._quiet and _draws_bars(self._stream):
            self._bar = _make_bar(self._stream)
            self._bar.start()
        self._last_call = self._clock()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        if self._quiet:
            return
        now = self._clock()
        starts = stage != self._stage or done < self._done
        repeats = not starts and done == self._done
        if starts:
            # the first report often comes after the first step, whose time belongs to the stage
            self._started = self._last_line = self._last_call if done else now
        self._stage, self._done, self._last_call = stage, done, now
        if self._bar is not None:
            self._advance_bar(stage, done, total, starts)
        elif not repeats:
            self._write_line(stage, done, total, now)

    def _advance_bar(self, stage: str, done: int, total: int, starts: bool) -> None:
        assert self._bar is not None
        if starts or self._task is None:
            from rich.markup import escape

            self._task = self._bar.add_task(escape(stage), total=total or None)
        self._bar.update(self._task, completed=done, total=total or None)

    def _write_line(self, stage: str, done: int, total: int, now: float) -> None:
        ends = 0 < total <= done
        if not ends and now - self._last_line < SECONDS_BETWEEN_LINES:
            return
        self._last_line = now
        print(progress_line(stage, done, total, now - self._started), file=self._stream, flush=True)


def progress_line(stage: str, done: int, total: int, seconds: float) -> str:
    """``calibrate 12/30, 40 s left``; a stage that has ended says how long it took."""
    if total <= 0:
        return f"{stage} {done}, {seconds_text(seconds)}"
    if done >= total:
        return f"{stage} {done}/{total}, {seconds_text(seconds)}"
    if done <= 0:
        return f"{stage} {done}/{total}"
    return f"{stage} {done}/{total}, {seconds_text(seconds / done * (total - done))} left"


def seconds_text(seconds: float) -> str:
    """``0.4 s``, ``40 s``, ``3 min 20 s``, ``2 h 5 min``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    if whole < 7200:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _draws_bars(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def _make_bar(stream: TextIO) -> Bar:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    return Bar(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(elapsed_when_finished=False),
        console=Console(file=stream),
        # rich would otherwise carry what is printed to stdout over to stderr
        redirect_stdout=False,
        redirect_stderr=False,
        expand=True,
    )
