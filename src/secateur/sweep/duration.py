"""How long the points of a sweep take, one after the other in one process, before the first of them begins."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from secateur.errors import SecateurError
from secateur.estimate.build import jobs_of
from secateur.estimate.leaving import leaving
from secateur.estimate.machine import try_machines, try_measuring
from secateur.estimate.result import about
from secateur.estimate.sizes import sizes_of
from secateur.estimate.work import measuring_seconds, seconds
from secateur.models.sources import Source
from secateur.observe.precision import compute_dtype
from secateur.sweep.axes import Point
from secateur.sweep.pools import InSequence, Pool
from secateur.sweep.records import DENSE, Record
from secateur.sweep.sources import statistics_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from secateur.sweep.spec import Sweep
    from secateur.sweep.worker import Job

# tasks that take no time beside the others
_INSTANT = ("size", "macs")
# what statistics that are there already spare
_SPARED = ("forwards", "statistics")


@dataclass(frozen=True)
class Duration:
    """``seconds`` that ``points`` take, and the tasks whose time nobody knows, which are not among them."""

    points: int
    seconds: float
    unknown: tuple[str, ...] = ()

    def line(self) -> str:
        """``24 points, about 2 h 5 min, and what lm_eval:arc_easy takes``."""
        noun = "point" if self.points == 1 else "points"
        more = f", and what {' and '.join(self.unknown)} take{'s' if len(self.unknown) == 1 else ''}"
        return f"{self.points} {noun}, {about(self.seconds)}{more if self.unknown else ''}"


def duration(points: Sequence[Point], job: Job, model: PreTrainedModel, *, dense: bool) -> Duration:
    """What ``points`` take in this order, after trials of this machine of a second or two per method.

    ``model`` is the dense one, which is measured as well where ``dense`` says so.
    """
    sizes = sizes_of(Source(model))
    unknown = tuple(task for task in job.tasks if _kind(task) not in ("perplexity", *_INSTANT))
    measuring = try_measuring(sizes, model.dtype, job.device)

    def measured(tasks: Sequence[str], gone: float = 0.0) -> float:
        texts = sum(_kind(task) == "perplexity" for task in tasks)
        return texts * measuring_seconds(sizes, measuring, gone, job.windows, job.length)

    total = measured(job.tasks) if dense else 0.0
    steps = [jobs_of(point.recipe, compute_dtype(point.recipe.dtype, model.device)) for point in points]
    machines = iter(try_machines(sizes, [step for several in steps for step in several]))
    known: set[str] = set()
    for point, several in zip(points, steps, strict=True):
        needed = statistics_of(point)
        gone, trained = 0.0, False
        for number, step in enumerate(several):
            taken = seconds(sizes, step, next(machines))
            # nothing but the plan is written
            spared = ["write"]
            if not number and needed and needed <= known and not (step.method.refits or step.trial_tokens):
                spared += _SPARED
            total += sum(count for stage, count in taken.items() if stage not in spared)
            gone, trained = gone + leaving(sizes, step).multiplied, trained or step.recovery is not None
        known |= needed
        total += measured(job.tasks, gone) + (measured(job.untrained, gone) if trained else 0.0)
    return Duration(len(points), total, (*unknown, *job.timed))


def announce_rest(
    sweep: Sweep, finished: Mapping[str, Record], pool: Pool, announce: Callable[[Duration], None] | None
) -> None:
    """Tell ``announce`` what is left of a grid that runs in this process; of a search nobody knows the points."""
    if announce is None or sweep.search is not None or not isinstance(pool, InSequence):
        return
    left = [point for point in sweep.points if point.key not in finished]
    # a point that can't run, or a model that isn't there, is for the sweep itself to tell
    with suppress(SecateurError):
        if left:
            announce(pool.worker.expected(left, dense=DENSE not in finished))


def _kind(task: str) -> str:
    return task.partition(":")[0]
