"""What is known of a point once it has run, and the journal that survives a killed sweep."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from secateur.journal import LineJournal
from secateur.report import Metric
from secateur.report.numbers import json_ready

DENSE = "dense"
_FILE = "journal.jsonl"


@dataclass(frozen=True)
class Record:
    """One point that has run, or the dense model, whose ``key`` is ``dense``.

    ``removed`` is the fraction of the blocks' weights that is gone; ``metrics`` hold one value each, under ``name``.
    ``model`` is the hash of the dense weights. A failed point has an ``error`` and no metrics.
    """

    name: str
    key: str
    values: Mapping[str, Any] = field(default_factory=dict)
    removed: float | None = None
    metrics: tuple[Metric, ...] = ()
    model: str = ""
    seconds: float = 0.0
    worker: int = 0
    """process that did it"""
    notes: tuple[str, ...] = ()
    attempts: int = 1
    error: str = ""
    stages: Mapping[str, float] = field(default_factory=dict)
    """seconds of ``plan`` and ``cut`` alone"""
    shared: bool = False
    """whether its statistics of the dense model were there already, so that ``plan`` took less than it would alone"""
    peak_bytes: int | None = None
    """largest resident memory of the process while it planned and cut, the dense model included"""
    kept: Mapping[str, list[float]] = field(default_factory=dict)
    """kind of unit, or ``weights`` → the fraction of every block that stays"""
    untrained: tuple[Metric, ...] = ()
    """metrics that were measured before a training as well, as they were then"""

    @property
    def done(self) -> bool:
        """False for a point that has failed for good."""
        return not self.error

    def metric(self, name: str, *, untrained: bool = False) -> float | None:
        """The value of one metric, of the trained model or of what it was before.

        None when it was not measured, or is NaN or inf, which the journal can't hold either.
        """
        found = self.untrained if untrained else self.metrics
        value = next((m.values[self.name] for m in found if m.name == name and self.name in m.values), None)
        return value if value is not None and math.isfinite(value) else None

    def parts(self, name: str, *, untrained: bool = False) -> list[float]:
        """What the value of one metric was computed from, see ``Metric``; empty where that is not known."""
        found = self.untrained if untrained else self.metrics
        return next((m.parts[self.name] for m in found if m.name == name and self.name in m.parts), [])

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return json_ready(dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Record:
        """The inverse of ``to_dict``."""
        several = {key: tuple(Metric(**metric) for metric in data.pop(key, ())) for key in ("metrics", "untrained")}
        return cls(**{**data, **several, "notes": tuple(data.pop("notes"))})


class Journal(LineJournal):
    """``journal.jsonl`` in the folder of a sweep: what was asked for, then one line per point, each on disk at once.

    ``settings`` is what makes points comparable: model, tasks, windows, versions.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        super().__init__(folder / _FILE, json_ready(dict(settings)), "a sweep")

    @staticmethod
    def exists(folder: Path) -> bool:
        """True when the folder holds a sweep."""
        return (folder / _FILE).is_file()

    def add(self, record: Record) -> None:
        """Append one point, and return when it is on the disk. Raises OutputError."""
        self.append(record.to_dict())

    def resume(self) -> dict[str, Record]:
        """Points that are done, by key; a last line that was cut off by a crash is dropped.

        Of points that had the same name in different sweeps the last one counts: it is the one whose plan is there.
        Raises OutputError when the sweep in the folder is another one, or the journal is damaged.
        """
        try:
            records = [Record.from_dict(line) for line in self.lines()]
        except (TypeError, KeyError) as error:
            raise self.damaged(str(error)) from None
        named = {record.name: record for record in records if record.done}
        return {record.key: record for record in named.values()}
