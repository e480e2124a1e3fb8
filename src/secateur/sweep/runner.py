"""Running a sweep: hand out points, try again what failed, write down what is done."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from secateur.errors import OutputError
from secateur.sweep.axes import Point
from secateur.sweep.pools import Pool, Task
from secateur.sweep.records import DENSE, Journal, Record
from secateur.sweep.sources import Grid, OptunaSearch, Source, statistics_of
from secateur.sweep.spec import Sweep
from secateur.sweep.worker import Failure, Job

Progress = Callable[[str, int, int], None]
# everything that a sweep writes into its folder, and all that --overwrite may remove
OURS = ("journal.jsonl", "results.json", "results.csv", "sweep.html", "curve.json", "curve.html")
OURS += ("compare.json", "compare.html", "plans", "statistics")


@dataclass
class Results:
    """What a sweep has given so far: the dense model's record and those of the points, in the order of the grid."""

    sweep: Sweep
    dense: Record | None = None
    points: list[Record] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    reused: int = 0
    """points that an earlier run had done"""

    @property
    def failed(self) -> list[Record]:
        """Records that failed for good, the dense model's included."""
        return [r for r in ([self.dense] if self.dense else []) + self.points if not r.done]


def make_job(
    sweep: Sweep,
    folder: Path,
    *,
    trust_remote_code: bool,
    plugins: tuple[str, ...],
    timed: tuple[str, ...] = (),
    untrained: tuple[str, ...] = (),
) -> Job:
    """What the workers are told. Size is always measured, and perplexity when nothing else is asked for.

    ``timed`` are more tasks, which are measured in turns with the dense model, and ``untrained`` those of the tasks
    that are measured before a training as well. Raises MissingExtraError when a point's training needs a library that
    isn't here.
    """
    for point in sweep.points:
        point.recipe.check_installed()
    base = sweep.base
    assert base.model is not None
    tasks = base.evaluate or ["perplexity:builtin"]
    return Job(
        model=base.model,
        tasks=tuple(dict.fromkeys([*tasks, "size"])),
        folder=str(folder.absolute()),
        directory=os.getcwd(),
        windows=base.windows,
        length=base.calibration.length,
        seed=base.calibration.seed,
        text_field=base.calibration.text_field,
        device=base.device,
        trust_remote_code=trust_remote_code,
        plugins=plugins,
        timed=timed,
        untrained=untrained,
    )


def open_journal(folder: Path, job: Job, *, resume: bool, overwrite: bool) -> tuple[Journal, dict[str, Record]]:
    """The journal in ``folder``, and the points that are done by key. Raises OutputError, before anything runs.

    With ``overwrite``, only what a sweep has written is removed.
    """
    from secateur.versions import library_versions

    shared = ("model", "windows", "length", "seed", "text_field", "device")
    settings = {key: getattr(job, key) for key in shared}
    journal = Journal(folder, {**settings, "tasks": [*job.tasks, *job.timed], "versions": library_versions()})
    check_folder(folder, resume=resume, overwrite=overwrite)
    if Journal.exists(folder):
        if resume:
            finished = journal.resume()
            # plans are part of the result: a point whose plan has gone is done again
            return journal, {k: r for k, r in finished.items() if k == DENSE or (folder / "plans" / r.name).is_dir()}
        for name in OURS:
            place = folder / name
            shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)
    journal.start()
    return journal, {}


def check_folder(folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse a folder that holds something else, or a sweep of which nothing was said. Raises OutputError."""
    if Journal.exists(folder):
        if not (resume or overwrite):
            raise OutputError(f"{folder} holds a sweep: pass --resume to go on with it, or --overwrite to begin anew")
    elif folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        # not even --overwrite: what lies there is not ours
        raise OutputError(f"{folder} exists and holds no sweep: choose another folder")


def run_sweep(
    sweep: Sweep, pool: Pool, journal: Journal, finished: Mapping[str, Record], progress: Progress
) -> Results:
    """Run what is not finished yet; the dense model comes first. Interrupts pass through, with the journal complete.

    A point that fails is run again, at most ``sweep.retries`` times; its last error is kept, and the others go on.
    Raises OutputError when the model is not the one of the points in the journal.
    """
    return _Run(sweep, pool, journal, finished, progress).run()


@contextmanager
def resumable(journal: Journal, sweep: Sweep) -> Iterator[None]:
    """An interrupt says what is there and how to go on. Raises KeyboardInterrupt."""
    try:
        yield
    except KeyboardInterrupt:
        done = len(collect(sweep, belonging(sweep, journal.resume())).points)
        raise KeyboardInterrupt(
            f"interrupted; {done} of {sweep.size} points are done: --resume goes on with the rest"
        ) from None


class _Run:
    def __init__(
        self, sweep: Sweep, pool: Pool, journal: Journal, finished: Mapping[str, Record], progress: Progress
    ) -> None:
        self._sweep, self._pool, self._journal, self._progress = sweep, pool, journal, progress
        self._records = belonging(sweep, finished)
        self._source: Source | None = None
        self._again: list[Task] = []
        self._busy = 0
        self._stored: set[str] = set()
        self._computing: dict[str, set[str]] = {}
        self._notes: list[str] = []
        self._models = {record.model for record in finished.values() if record.model}

    def run(self) -> Results:
        reused = len(collect(self._sweep, self._records).points)
        self._report()
        if DENSE not in self._records:
            self._start(Task(None))
            self._wait()
        else:
            self._begin()
        while self._fill() or self._busy:
            self._wait()
        return replace(collect(self._sweep, self._records), notes=self._notes, reused=reused)

    def _begin(self) -> None:
        """The dense model is measured: points may come."""
        dense = self._records[DENSE]
        if self._sweep.search is None:
            self._source = Grid(self._sweep, self._records)
        elif dense.done:
            self._source = OptunaSearch(self._sweep, {k: r for k, r in self._records.items() if k != DENSE}, dense)
        else:
            self._notes.append("nothing was searched: the dense model could not be measured")

    def _fill(self) -> bool:
        """Start what can start; True when something did."""
        started = False
        while self._pool.free:
            task = self._next_task()
            if task is None:
                break
            self._start(task)
            started = True
        return started

    def _next_task(self) -> Task | None:
        for task in self._again:
            if task.point is None or self._may_start(task.point):
                self._again.remove(task)
                return task
        point = self._source.take(self._may_start) if self._source else None
        return Task(point) if point is not None else None

    def _may_start(self, point: Point) -> bool:
        """False while another worker computes statistics that this point would only find when that one is done."""
        computing = set().union(*self._computing.values())
        return not (statistics_of(point) - self._stored) & computing

    def _start(self, task: Task) -> None:
        if task.point is not None:
            self._computing[task.point.key] = statistics_of(task.point) - self._stored
        self._pool.submit(task)
        self._busy += 1

    def _wait(self) -> None:
        task, outcome = self._pool.next()
        self._busy -= 1
        key = task.point.key if task.point else DENSE
        needed = self._computing.pop(key, set())
        if isinstance(outcome, Failure):
            self._fail(task, outcome)
            return
        self._stored |= needed
        if self._models and outcome.model not in self._models:
            raise OutputError(
                f"{self._sweep.base.model} has other weights than when {self._journal.path.parent} was begun: choose "
                "another folder, or pass --overwrite"
            )
        self._models.add(outcome.model)
        self._settle(task, replace(outcome, attempts=task.attempt))

    def _fail(self, task: Task, failure: Failure) -> None:
        name = task.point.name if task.point else DENSE
        if not failure.final and task.attempt <= self._sweep.retries:
            self._notes.append(f"{name} is tried again: {failure.error}")
            again = Task(task.point, task.attempt + 1)
            if task.point is None:
                # nothing else may start before the dense model is measured
                self._start(again)
                self._wait()
            else:
                self._again.append(again)
            return
        values = dict(task.point.values) if task.point else {}
        key = task.point.key if task.point else DENSE
        self._settle(task, Record(name, key, values, error=failure.error, attempts=task.attempt))

    def _settle(self, task: Task, record: Record) -> None:
        self._journal.add(record)
        self._records[record.key] = record
        if task.point is None:
            self._begin()
        elif self._source is not None:
            self._source.tell(task.point, record)
        self._report()

    def _report(self) -> None:
        self._progress("sweep", len(collect(self._sweep, self._records).points), self._sweep.size)


def belonging(sweep: Sweep, records: Mapping[str, Record]) -> dict[str, Record]:
    """Those of an earlier run's records that the search may ask for; a grid knows its own by their keys."""
    if sweep.search is None:
        return dict(records)
    return {key: record for key, record in records.items() if key == DENSE or sweep.searches(record.values, key)}


def collect(sweep: Sweep, records: Mapping[str, Record]) -> Results:
    """The results among ``records``: those of the grid in its order, or of the search in the order of the journal."""
    dense = records.get(DENSE)
    if sweep.search is None:
        # an earlier run may have had the same points by other axes
        points = [replace(records[p.key], values=p.values) for p in sweep.points if p.key in records]
    else:
        points = [r for k, r in records.items() if k != DENSE]
    return Results(sweep, dense, points)
