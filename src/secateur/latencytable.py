"""The file in which measured latencies are kept: what was timed, at which widths, and on which machine.

It is JSON, or, where its name ends in .csv, a table for people and spreadsheets: a first line ``#`` with machine, torch
and, where ONNX models were timed, onnxruntime as JSON, then the columns ``call``, ``milliseconds`` and one per
dimension that was narrowed (``a``, ``b``).
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from secateur.errors import DataError, OutputError, UsageError
from secateur.files import cache_folder, write_text
from secateur.reading import read_bytes, read_json
from secateur.versions import library_versions, machine

FORMAT_VERSION = 1
MAX_CSV_BYTES = 100_000_000
_COLUMNS = ("call", "milliseconds")


@dataclass(frozen=True)
class Entry:
    """Milliseconds on a grid: ``widths`` are the measured shares of each dimension that can shrink, ascending."""

    widths: tuple[NDArray[np.float64], ...]
    milliseconds: NDArray[np.float64]

    def at(self, shares: Sequence[float]) -> float:
        """Milliseconds when these shares of the dimensions are kept, linear between the measured ones."""
        grid = self.milliseconds
        for points, share in zip(self.widths, shares, strict=True):
            after = min(max(int(np.searchsorted(points, share)), 1), len(points) - 1)
            if len(points) == 1:
                grid = grid[0]
                continue
            left, right = points[after - 1], points[after]
            part = min(max((share - left) / (right - left), 0.0), 1.0)
            grid = (1 - part) * grid[after - 1] + part * grid[after]
        return float(grid)


class _StoredEntry(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    widths: list[list[float]]
    milliseconds: Any

    def entry(self) -> Entry:
        grid = np.array(self.milliseconds, dtype=np.float64)
        widths = tuple(np.array(w, dtype=np.float64) for w in self.widths)
        rising = all((np.diff(w) > 0).all() for w in widths)
        if list(grid.shape) != [len(w) for w in widths] or not rising or not (grid >= 0).all():
            raise ValueError("times don't fit their widths")
        return Entry(widths, grid)


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid")

    format_version: int
    machine: dict[str, Any]
    torch: str
    onnxruntime: str = ""
    entries: dict[str, _StoredEntry]


@dataclass
class LatencyTable:
    """Measured latencies by the call that was timed; ``path`` is the file that keeps them, None for none."""

    path: Path | None = None
    machine: dict[str, Any] = field(default_factory=machine)
    torch: str = field(default_factory=lambda: library_versions()["torch"])
    onnxruntime: str = ""
    """Where it holds times of ONNX models, the version that ran them."""
    entries: dict[str, Entry] = field(default_factory=dict)

    @classmethod
    def open(cls, path: str | Path | None) -> LatencyTable:
        """The table of a file, or an empty one where there is no file yet. Raises DataError for a damaged one."""
        if path is None or not Path(path).exists():
            return cls(None if path is None else Path(path))
        try:
            document = _Document.model_validate(_read(Path(path)))
            entries = {name: stored.entry() for name, stored in document.entries.items()}
        except (ValidationError, ValueError, TypeError):
            raise DataError(f"{path} is not a table of latencies that secateur wrote") from None
        if document.format_version != FORMAT_VERSION:
            raise DataError(f"{path} has format {document.format_version}, and this version reads {FORMAT_VERSION}")
        return cls(Path(path), document.machine, document.torch, document.onnxruntime, entries)

    @classmethod
    def cached(cls) -> LatencyTable:
        """The table of this machine and this torch in the user's cache folder. Raises OutputError."""
        here = cls()
        key = hashlib.sha256(json.dumps([here.machine, here.torch], sort_keys=True).encode()).hexdigest()[:16]
        folder = cache_folder() / "latency"
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"can't keep latencies in {folder}: {error.strerror or error}; name a file") from None
        return cls.open(folder / f"{key}.json")

    @property
    def difference(self) -> str:
        """Where the machine of the table differs from this one, ``cpu is A, here B``; empty when it is this one."""
        mine = machine()
        for key in {**mine, **self.machine}:
            if self.machine.get(key) != mine.get(key):
                return f"{key} is {self.machine.get(key)}, here {mine.get(key)}"
        return ""

    def check_machine(self, missing: int) -> None:
        """A table of another machine is used as it is, and nothing is added. Raises UsageError when that is needed."""
        if missing and self.difference:
            theirs, _, ours = self.difference.partition(", here ")
            raise UsageError(
                f"{self.path} lacks {missing} measurements of this network, and was made where {theirs} (here {ours}):"
                " measure it there, or name another file"
            )

    def save(self) -> None:
        """Write the file, if there is one, under a temporary name, and rename it. Raises OutputError."""
        if self.path is None:
            return
        if self.path.suffix == ".csv":
            write_text(self.path, self._csv())
            return
        document = {
            **self._head(),
            "entries": {
                key: {"widths": [w.tolist() for w in entry.widths], "milliseconds": entry.milliseconds.tolist()}
                for key, entry in self.entries.items()
            },
        }
        write_text(self.path, json.dumps(document, indent=1) + "\n")

    def _head(self) -> dict[str, Any]:
        """What the file says beside the entries."""
        runtime = {"onnxruntime": self.onnxruntime} if self.onnxruntime else {}
        return {"format_version": FORMAT_VERSION, "machine": self.machine, "torch": self.torch, **runtime}

    def _csv(self) -> str:
        """The table as CSV; numbers keep all their digits."""
        lines = io.StringIO()
        lines.write(f"# {json.dumps(self._head())}\n")
        dims = max((len(entry.widths) for entry in self.entries.values()), default=0)
        writer = csv.writer(lines, lineterminator="\n")
        writer.writerow([*_COLUMNS, *(chr(ord("a") + dim) for dim in range(dims))])
        for call, entry in self.entries.items():
            for point, taken in np.ndenumerate(entry.milliseconds):
                widths = [float(w[at]) for w, at in zip(entry.widths, point, strict=True)]
                writer.writerow([call, float(taken), *widths])
        return lines.getvalue()

    @property
    def about(self) -> str:
        """The machine, for people."""
        at = self.machine
        return f"{at['accelerator'] or at['cpu']}, {at['threads']} threads, torch {self.torch}"

    @property
    def about_onnx(self) -> str:
        """The machine as ONNX models see it."""
        return f"{self.machine['cpu']}, {self.machine['threads']} threads, onnxruntime {self.onnxruntime}"


def _read(path: Path) -> Any:
    """The document in a file. Raises DataError, and ValueError for a table that isn't one."""
    if path.suffix != ".csv":
        return read_json(path, DataError)
    head, _, rest = read_bytes(path, MAX_CSV_BYTES, DataError).decode("utf8").partition("\n")
    rows = csv.reader(io.StringIO(rest))
    if not head.startswith("#") or next(rows, ())[: len(_COLUMNS)] != list(_COLUMNS):
        raise ValueError("no table of latencies")
    points: dict[str, dict[tuple[float, ...], float]] = {}
    for call, taken, *widths in rows:
        points.setdefault(call, {})[tuple(float(w) for w in widths if w)] = float(taken)
    entries: dict[str, Any] = {}
    for call, grid in points.items():
        widths = [sorted(set(along)) for along in zip(*grid, strict=True)]
        missing = float("nan")  # refused where a point of the grid is not there
        times = np.array([grid.get(point, missing) for point in itertools.product(*widths)])
        entries[call] = {"widths": widths, "milliseconds": times.reshape([len(w) for w in widths]).tolist()}
    return {**json.loads(head.removeprefix("#")), "entries": entries}
