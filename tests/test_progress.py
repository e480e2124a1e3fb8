"""Progress: bars on terminals, sparse lines elsewhere, nothing when quiet, never on stdout."""

from __future__ import annotations

import io
import re

import pytest

from secateur.progress import Progress, progress_line, seconds_text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """Time that passes only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def real_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")


def run(steps: int, seconds: float, stage: str = "calibrate") -> list[str]:
    stream, clock = io.StringIO(), Clock()
    with Progress(stream=stream, clock=clock) as progress:
        for done in range(1, steps + 1):
            clock.now += seconds
            progress(stage, done, steps)
    return stream.getvalue().splitlines()


def test_lines_come_every_ten_seconds_and_at_the_end() -> None:
    assert run(30, 1.0) == [
        "calibrate 10/30, 20 s left",
        "calibrate 20/30, 10 s left",
        "calibrate 30/30, 30 s",
    ]


def test_a_fast_stage_is_one_line() -> None:
    assert run(30, 0.01) == ["calibrate 30/30, 0.3 s"]


def test_slow_steps_are_a_line_each() -> None:
    assert run(3, 25.0) == ["calibrate 1/3, 50 s left", "calibrate 2/3, 25 s left", "calibrate 3/3, 75 s"]


def test_every_stage_has_its_own_time() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress(stream=stream, clock=clock) as progress:
        for stage, seconds in (("calibrate", 8.0), ("evaluate", 3.0), ("evaluate", 4.0)):
            for done in (1, 2):
                clock.now += seconds
                progress(stage, done, 2)
    assert stream.getvalue().splitlines() == ["calibrate 2/2, 16 s", "evaluate 2/2, 6.0 s", "evaluate 2/2, 8.0 s"]


def test_a_stage_that_starts_at_zero_does_not_pay_for_what_came_before() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress(stream=stream, clock=clock) as progress:
        clock.now += 60
        progress("cut", 0, 2)
        clock.now += 1
        progress("cut", 2, 2)
        progress("cut", 2, 2)
    assert stream.getvalue() == "cut 2/2, 1.0 s\n"


def test_unknown_totals_are_counted() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress(stream=stream, clock=clock) as progress:
        for done in (1, 2, 3):
            clock.now += 6
            progress("read", done, 0)
    assert stream.getvalue() == "read 2, 12 s\n"


def test_an_interrupted_stage_keeps_its_error() -> None:
    stream = io.StringIO()
    with pytest.raises(KeyboardInterrupt), Progress(stream=stream) as progress:
        progress("calibrate", 1, 30)
        raise KeyboardInterrupt
    assert stream.getvalue() == ""


def test_a_terminal_gets_a_bar_with_the_time_left() -> None:
    stream = Terminal()
    with Progress(stream=stream) as progress:
        for done in range(4):
            progress("calibrate [b]", done, 4)
        progress("calibrate [b]", 4, 4)
        progress("cut", 1, 1)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert "calibrate [b]" in text and "cut" in text
    assert "4/4" in text and "━" in text
    assert re.search(r"\d:\d\d:\d\d", text)


def test_a_terminal_is_left_usable_after_an_error() -> None:
    stream = Terminal()
    with pytest.raises(ValueError, match="broken"), Progress(stream=stream) as progress:
        progress("calibrate", 1, 30)
        raise ValueError("broken")
    hidden, shown = "\x1b[?25l", "\x1b[?25h"
    assert stream.getvalue().rindex(shown) > stream.getvalue().rindex(hidden)


def test_dumb_terminals_get_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    with Progress(stream=stream) as progress:
        progress("cut", 1, 1)
    assert re.fullmatch(r"cut 1/1, \d\.\d s\n", stream.getvalue())


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()], ids=["file", "terminal"])
def test_quiet_writes_nothing(stream: io.StringIO) -> None:
    with Progress(quiet=True, stream=stream) as progress:
        progress("calibrate", 1, 1)
    assert stream.getvalue() == ""


@pytest.mark.parametrize("terminal", [False, True])
def test_stdout_belongs_to_results(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal, raising=False)
    with Progress() as progress:
        print("result")
        progress("calibrate", 1, 1)
    captured = capsys.readouterr()
    assert captured.out == "result\n"
    assert "calibrate" in captured.err and "result" not in captured.err


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.44, "0.4 s"), (9.96, "10 s"), (40.2, "40 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")]
)
def test_seconds(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text


def test_nothing_done_has_no_estimate() -> None:
    assert progress_line("calibrate", 0, 30, 12.0) == "calibrate 0/30"
