"""Where a training is kept: its journal, and in ``state`` where it is, from which it goes on to the bit."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from secateur.errors import CorruptFileError, OutputError
from secateur.files import write_text
from secateur.loop import Curve, Keeper
from secateur.ranks import ALONE, Ranks
from secateur.runs.folder import StepFolder
from secateur.runs.signals import StopRequest
from secateur.tensorfiles import read_header, write_tensors

SECONDS_BETWEEN_STATES = 30.0
"""A killed run repeats at most so much of its training."""


class TrainingFolder(StepFolder):
    """The folder of a training: its journal, and in ``state`` where it is."""

    ROOMS = ("state", "out")

    def __init__(self, path: Path, stop: StopRequest, hint: str) -> None:
        super().__init__(path, stop, hint)
        stop.piece = "step"


class StateKeeper(Keeper):
    """Keeps the state of a training in a folder, at most ``SECONDS_BETWEEN_STATES`` old, and stops when asked to.

    ``read`` makes a curve of what its ``to_json`` has written. The first of the ``ranks`` writes; all read. Raises
    Stopped after a step, once its state is on the disk.
    """

    def __init__(self, step: TrainingFolder, read: Callable[[str], Any], ranks: Ranks = ALONE) -> None:
        self._step, self._read, self._ranks = step, read, ranks
        # the first step is kept at once: from then on nothing is lost
        self._last = float("-inf")

    def reads(self, sha256: str) -> None:
        self._step.reads(sha256)

    def settles(self, what: str, value: str) -> str:
        note = self._step.path / f"{what}.txt"
        if note.is_file():
            return note.read_text(encoding="utf8")
        write_text(note, value)
        return value

    def restored(self) -> tuple[Any, Mapping[str, Tensor]] | None:
        # nobody reads while somebody writes
        self._ranks.meet()
        if not self._ranks.main:
            self._step.reopen()
        finished = self._step.journal.of("trained")
        if not finished:
            return None
        state, curve = self._files(max(finished))
        try:
            tensors = {name: stored.read() for name, stored in read_header(state).items()}
            found = self._read(curve.read_text(encoding="utf8")), tensors
        except (OSError, ValueError, CorruptFileError) as error:
            raise OutputError(f"{self._step.path} is damaged ({error}): remove the run and begin again") from None
        self._ranks.meet()
        return found

    def finished(self, curve: Curve, state: Callable[[], Mapping[str, Tensor]], *, last: bool) -> None:
        stopping = self._ranks.any(self._step.stopping)
        old = self._ranks.any(self._ranks.main and time.monotonic() - self._last >= SECONDS_BETWEEN_STATES)
        if stopping or last or old:
            # ranks that share the weights gather them together
            tensors = state()
            if self._ranks.main:
                self._write(curve, tensors)
        if stopping:
            self._step.check_stop(f"step {curve.steps} of the training", self._ranks)

    def _write(self, curve: Curve, state: Mapping[str, Tensor]) -> None:
        file, text = self._files(curve.steps)
        write_tensors(file, state, durable=True)
        text.write_text(curve.to_json(), encoding="utf8")
        self._step.add(trained=curve.steps)
        for older in file.parent.iterdir():
            if older not in (file, text):
                older.unlink(missing_ok=True)
        self._last = time.monotonic()

    def _files(self, steps: int) -> tuple[Path, Path]:
        room = self._step.path / "state"
        return room / f"step-{steps:07d}.safetensors", room / f"step-{steps:07d}.json"
