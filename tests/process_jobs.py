"""What commands in processes of their own find replaced (see ``forking.py``)."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any


def save_slowly() -> None:
    """The first weights that are written stay half written until the process is interrupted."""
    from secateur.models import shards

    def write_tensors(path: Path, *rest: Any, **options: Any) -> None:
        path.write_text("half")
        print("saving", file=sys.stderr, flush=True)
        time.sleep(60)

    shards.write_tensors = write_tensors


def break_opening() -> None:
    """A bug where models are opened."""
    from secateur.models import opening

    def open_source(*arguments: Any, **options: Any) -> Any:
        raise ZeroDivisionError("a bug")

    opening.open_source = open_source  # type: ignore[assignment]


def die_in_training() -> None:
    """Killed right after the state of the second step is on the disk."""
    _at_step(2, signal.SIGKILL)


def interrupt_training() -> None:
    """SIGINT in the middle of the third step."""
    _at_step(3, signal.SIGINT)


def _at_step(number: int, sent: int) -> None:
    from secateur.runs import states

    states.SECONDS_BETWEEN_STATES = 0.0
    finished = states.StateKeeper.finished

    def signalled(self: Any, curve: Any, state: Any, *, last: bool) -> None:
        if curve.steps == number and sent == signal.SIGINT:
            os.kill(os.getpid(), sent)
        finished(self, curve, state, last=last)
        if curve.steps == number:
            os.kill(os.getpid(), sent)

    states.StateKeeper.finished = signalled  # type: ignore[method-assign]


def die_in_the_second_stage() -> None:
    """Killed in the middle of the training of the second of several stages."""
    from secateur.runs import states

    states.SECONDS_BETWEEN_STATES = 0.0
    finished = states.StateKeeper.finished

    def killed(self: Any, curve: Any, state: Any, *, last: bool) -> None:
        finished(self, curve, state, last=last)
        if "step-2" in str(self._step.path) and curve.steps == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    states.StateKeeper.finished = killed  # type: ignore[method-assign]
