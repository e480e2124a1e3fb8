"""What a worker does: load the dense model once, then plan, cut and measure one point after another."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.errors import ModelLoadError, OutputError, SecateurError, unforeseen
from secateur.sweep.axes import Point
from secateur.sweep.memory import PeakMemory
from secateur.sweep.records import DENSE, Record
from secateur.sweep.sources import statistics_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from secateur.engine.recovering import Teacher
    from secateur.evaluation import Table
    from secateur.healing.recovery.states import FinalStates
    from secateur.plans import Plan
    from secateur.report import LayerCut, Metric
    from secateur.structure import Anatomy
    from secateur.sweep.expected import Expected


@dataclass(frozen=True)
class Job:
    """What all points of a sweep share. ``folder`` is that of the sweep, seen from ``directory``.

    ``timed`` are tasks that are measured in turns with the dense model, so that a machine that slows down meets both,
    and ``untrained`` those that are measured before a training as well.
    """

    model: str
    tasks: tuple[str, ...]
    folder: str
    directory: str
    windows: int
    length: int
    seed: int
    text_field: str | None
    device: str
    trust_remote_code: bool = False
    plugins: tuple[str, ...] = ()
    timed: tuple[str, ...] = ()
    untrained: tuple[str, ...] = ()


@dataclass(frozen=True)
class Failure:
    """Why a point has not run; ``final`` when trying again would give the same."""

    error: str
    final: bool


class Worker:
    """Runs points in this process; the model is loaded when the first one comes."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase | None] | None = None
        self._anatomies: dict[str, Anatomy] = {}
        self._states: FinalStates | None = None

    def check(self, points: Iterable[Point]) -> None:
        """Refuse points whose first step the model can't have, before anything is measured.

        Raises the SecateurError of the first of them, with its name in front.
        """
        from secateur.engine import check_model
        from secateur.models.loading import check_sums

        model, _ = self._dense()
        check_sums(model.device)
        for point in points:
            method, _ = point.recipe.words(point.recipe.steps[0])
            try:
                anatomy = self.anatomy(getattr(method, "heads", "kv"))
                check_model(method, model, anatomy)
                point.recipe.check_reach(anatomy)
            except SecateurError as error:
                raise type(error)(f"{point.name}: {error}") from None

    def expected(self, points: Sequence[Point], *, dense: bool) -> Expected:
        """What ``points`` take here, and measuring the dense model where ``dense`` asks for that."""
        from secateur.sweep.expected import expect

        return expect(points, self._job, self._dense()[0], dense=dense)

    def release(self) -> None:
        """Let the model go, for work that others do; what asks for it loads it again."""
        self._loaded = None

    def anatomy(self, heads: str) -> Anatomy:
        """Of the dense model, by the unit of its attention, ``kv`` or ``query``."""
        from secateur import api

        if heads not in self._anatomies:
            self._anatomies[heads] = api.anatomy(self._dense()[0], heads=heads)
        return self._anatomies[heads]

    def run(self, point: Point | None) -> Record | Failure:
        """The record of a point, or of the dense model for None. Never raises what a point may do wrong."""
        started = time.perf_counter()
        try:
            record = self._measure_dense() if point is None else self._measure(point)
        except SecateurError as error:
            # a full disk or a hub that doesn't answer may be better the next time
            return Failure(str(error), final=not isinstance(error, (OutputError, ModelLoadError)))
        except Exception as error:
            return Failure(unforeseen(error), final=False)
        return Record(**{**record, "seconds": time.perf_counter() - started, "worker": os.getpid()})

    def _measure_dense(self) -> dict[str, Any]:
        from secateur.models.fingerprint import fingerprint
        from secateur.models.sources import Source

        model, _ = self._dense()
        return {
            "name": DENSE,
            "key": DENSE,
            "removed": 0.0,
            "metrics": self._evaluate(DENSE, model),
            "model": fingerprint(Source(model)).weights,
        }

    def _measure(self, point: Point) -> dict[str, Any]:
        from secateur import api
        from secateur.healing.recovery import split_heal
        from secateur.models.sources import Source
        from secateur.recipes import merge_reports
        from secateur.report.build import with_zeros_counted

        dense, tokenizer = self._dense()
        current, own, plans, reports = dense, tokenizer, [], []
        stored = Path(self._job.folder) / "statistics"
        before = _files(stored)
        peaks: list[int] = []
        untrained: tuple[Metric, ...] = ()
        for step in point.recipe.steps:
            # later steps work on models that no other point has
            first, arguments = not plans, point.recipe.plan_arguments(step)
            repair, training = split_heal(arguments.pop("heal"), point.recipe.calibration.seed)
            with PeakMemory(self._job.device) as memory:
                result = api.prune(
                    current, own, inplace=not first, statistics=stored if first else None, heal=repair, **arguments
                )
            peaks.append(memory.bytes)
            if training is not None:
                if self._job.untrained:
                    untrained = tuple(
                        self._table({point.name: result.model}, self._job.untrained, {point.name: result.tokenizer})
                    )
                with PeakMemory(self._job.device) as memory:
                    result = api.train_cut(result, training, teacher=self._teacher(), earlier=plans, **arguments)
                peaks.append(memory.bytes)
            current, own = result.model, result.tokenizer
            plans.append(result.plan)
            reports.append(result.report)
        shared = bool(statistics_of(point)) and _files(stored) == before
        report = merge_reports(reports)
        if len(reports) > 1 and report.masked:
            source = Source(current)
            report = with_zeros_counted(report, api.anatomy(current), lambda name: source.count(name)[1])
        metrics = self._evaluate(point.name, current, own)
        # last: what another sweep of this folder had under this name is replaced when all else is done
        write_plans(plans, Path(self._job.folder) / "plans" / point.name)
        return {
            "name": point.name,
            "key": point.key,
            "values": point.values,
            "removed": report.achieved,
            "metrics": metrics,
            "untrained": untrained,
            "model": plans[0].model.weights,
            "notes": tuple(dict.fromkeys([report.reach, *report.notes] if report.reach else report.notes)),
            "stages": report.seconds,
            "shared": shared,
            "peak_bytes": max(peaks),
            "kept": kept_fractions(report.layers),
        }

    def _teacher(self) -> Teacher:
        """The dense model, which remembers what it said to the points before."""
        from secateur.engine.recovering import Teacher
        from secateur.healing.recovery.states import FinalStates

        self._states = self._states or FinalStates()
        return Teacher(self._dense()[0], states=self._states)

    def _dense(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
        if self._loaded is None:
            from secateur import api

            job = self._job
            self._loaded = api.load(job.model, dtype="auto", device=job.device, trust_remote_code=job.trust_remote_code)
        return self._loaded

    def _evaluate(
        self, name: str, model: PreTrainedModel, own: PreTrainedTokenizerBase | None = None
    ) -> tuple[Metric, ...]:
        alone = self._table({name: model}, self._job.tasks, {name: own})
        if not self._job.timed:
            return tuple(alone)
        return (*alone, *self._table({DENSE: self._dense()[0], name: model}, self._job.timed))

    def _table(
        self,
        models: Mapping[str, PreTrainedModel],
        tasks: Sequence[str],
        tokenizers: Mapping[str, PreTrainedTokenizerBase | None] | None = None,
    ) -> Table:
        from secateur import api

        job = self._job
        return api.evaluate(
            models,
            self._dense()[1],
            tasks,
            length=job.length,
            windows=job.windows,
            seed=job.seed,
            text_field=job.text_field,
            tokenizers=tokenizers,
        )


def kept_fractions(layers: Sequence[LayerCut]) -> dict[str, list[float]]:
    """Kind of unit → the fraction of every block that stays, and the same of its ``weights``."""
    kept = {"weights": [1.0 - cut.sparsity for cut in layers]}
    for kind in dict.fromkeys(kind for cut in layers for kind in cut.units):
        pairs = [cut.units.get(kind, (1, 1)) for cut in layers]
        kept[kind] = [after / before for before, after in pairs]
    return kept


def _files(folder: Path) -> int:
    return sum(path.is_file() for path in folder.rglob("*"))


def write_plans(plans: Sequence[Plan], folder: Path) -> None:
    """``folder`` with the plan, or with ``step-1``, ``step-2``, ... Raises OutputError."""
    from secateur.files import output_folder

    # what an attempt that was killed later has left is replaced
    with output_folder(folder, overwrite=True) as path:
        for number, plan in enumerate(plans, start=1):
            place = path if len(plans) == 1 else path / f"step-{number}"
            place.mkdir(exist_ok=True)
            plan.write(place)
