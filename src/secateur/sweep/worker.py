"""What a worker does: load the dense model once, then plan, cut and measure one point after another."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.errors import ModelLoadError, OutputError, SecateurError
from secateur.sweep.axes import Point
from secateur.sweep.records import DENSE, Record

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from secateur.evaluation import Table
    from secateur.plans import Plan


@dataclass(frozen=True)
class Job:
    """What all points of a sweep share. ``folder`` is that of the sweep, seen from ``directory``."""

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

    def run(self, point: Point | None) -> Record | Failure:
        """The record of a point, or of the dense model for None. Never raises what a point may do wrong."""
        started = time.perf_counter()
        try:
            record = self._measure_dense() if point is None else self._measure(point)
        except SecateurError as error:
            # a full disk or a hub that doesn't answer may be better the next time
            return Failure(str(error), final=not isinstance(error, (OutputError, ModelLoadError)))
        except Exception as error:
            return Failure(f"{type(error).__name__}: {error}", final=False)
        return Record(**{**record, "seconds": time.perf_counter() - started, "worker": os.getpid()})

    def _measure_dense(self) -> dict[str, Any]:
        from secateur.models.fingerprint import fingerprint
        from secateur.models.sources import Source

        model, _ = self._dense()
        table = self._evaluate(DENSE, model)
        return {
            "name": DENSE,
            "key": DENSE,
            "removed": 0.0,
            "metrics": tuple(table),
            "model": fingerprint(Source(model)).weights,
        }

    def _measure(self, point: Point) -> dict[str, Any]:
        from secateur import api
        from secateur.recipes import merge_reports

        dense, tokenizer = self._dense()
        current, plans, reports = dense, [], []
        for step in point.recipe.steps:
            # later steps work on models that no other point has
            statistics = None if plans else Path(self._job.folder) / "statistics"
            arguments = point.recipe.plan_arguments(step)
            result = api.prune(current, tokenizer, inplace=current is not dense, statistics=statistics, **arguments)
            current = result.model
            plans.append(result.plan)
            reports.append(result.report)
        write_plans(plans, Path(self._job.folder) / "plans" / point.name)
        report = merge_reports(reports)
        return {
            "name": point.name,
            "key": point.key,
            "values": point.values,
            "removed": report.achieved,
            "metrics": tuple(self._evaluate(point.name, current)),
            "model": plans[0].model.weights,
            "notes": tuple(dict.fromkeys(report.notes)),
        }

    def _dense(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
        if self._loaded is None:
            from secateur import api

            job = self._job
            self._loaded = api.load(job.model, dtype="auto", device=job.device, trust_remote_code=job.trust_remote_code)
        return self._loaded

    def _evaluate(self, name: str, model: PreTrainedModel) -> Table:
        from secateur import api

        job = self._job
        return api.evaluate(
            {name: model},
            self._dense()[1],
            job.tasks,
            length=job.length,
            windows=job.windows,
            seed=job.seed,
            text_field=job.text_field,
        )


def write_plans(plans: Sequence[Plan], folder: Path) -> None:
    """``folder`` with the plan, or with ``step-1``, ``step-2``, ... Raises OutputError."""
    from secateur.files import output_folder

    # what an attempt that was killed later has left is replaced
    with output_folder(folder, overwrite=True) as path:
        for number, plan in enumerate(plans, start=1):
            place = path if len(plans) == 1 else path / f"step-{number}"
            place.mkdir(exist_ok=True)
            plan.write(place)
