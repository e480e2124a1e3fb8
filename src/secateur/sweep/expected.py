"""What the points of a sweep take, one after the other in one process, before the first of them begins."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING

from secateur.errors import SecateurError
from secateur.estimate.build import jobs_of
from secateur.estimate.job import Job as Step
from secateur.estimate.job import on_processor
from secateur.estimate.leaving import leaving
from secateur.estimate.machine import available_on, resident_bytes, try_machines, try_measuring
from secateur.estimate.memory import memory
from secateur.estimate.result import about
from secateur.estimate.sizes import Sizes, sizes_of
from secateur.estimate.work import measuring_seconds, seconds
from secateur.evaluation.perplexity import windows_per_batch
from secateur.memory import available_memory
from secateur.models.sources import Source
from secateur.observe.precision import compute_dtype
from secateur.report.numbers import format_bytes
from secateur.sweep.axes import Point
from secateur.sweep.pools import InSequence, Pool
from secateur.sweep.records import DENSE, Record
from secateur.sweep.sources import statistics_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from secateur.sweep.spec import Sweep
    from secateur.sweep.worker import Job

# tasks that take no time beside the others
_INSTANT = ("size", "macs")
# what statistics that are there already spare
_SPARED = ("forwards", "statistics")


@dataclass(frozen=True)
class Expected:
    """``seconds`` that ``points`` take, and the ``unknown`` tasks whose time nobody knows, which are not among them.

    ``clock`` tells the seconds; it tries this machine, for a second or two per kind of work, when they are asked for.

    ``memory`` is the peak of the process, in bytes, at the point ``largest``, where ``available_memory`` are there;
    ``device_memory`` and ``available_device_memory`` are those of another device that computes. It is the first point
    that can't fit where there is one. ``copied`` is what a copy of the model takes where it lies, which any point has.
    """

    points: int
    clock: Callable[[], float]
    unknown: tuple[str, ...] = ()
    largest: str = ""
    memory: int = 0
    available_memory: int = 0
    device_memory: int = 0
    available_device_memory: int | None = None
    copied: int = 0

    @cached_property
    def seconds(self) -> float:
        """Of all points."""
        return self.clock()

    def line(self) -> str:
        """``24 points, up to 3.1 GB of memory, about 2 h 5 min, and what lm_eval:arc_easy takes``."""
        noun = "point" if self.points == 1 else "points"
        more = f", and what {' and '.join(self.unknown)} take{'s' if len(self.unknown) == 1 else ''}"
        most = f"up to {format_bytes(self.memory)} of memory"
        return f"{self.points} {noun}, {most}, {about(self.seconds)}{more if self.unknown else ''}"

    @property
    def problem(self) -> str:
        """One sentence about the point that can't fit; empty when all do."""
        if self.memory > self.available_memory:
            taken, there, where = self.memory, self.available_memory, "memory"
        elif self.available_device_memory is not None and self.device_memory > self.available_device_memory:
            taken, there, where = self.device_memory, self.available_device_memory, "the device's memory"
        else:
            return ""
        if self.copied > there:
            way = "any point holds the model and a copy of it, where 'secateur prune' reads one block at a time;"
        else:
            way = "leave it out, calibrate on fewer or shorter windows, or"
        short = f"{self.largest} would take {format_bytes(taken)} of {where}, and {format_bytes(there)} are there"
        return f"{short}: {way} try all the same with --no-estimate"


def expect(points: Sequence[Point], job: Job, model: PreTrainedModel, *, dense: bool) -> Expected:
    """What ``points`` take in this order.

    ``model`` is the dense one, which is measured as well where ``dense`` says so.
    """
    sizes = sizes_of(Source(model))
    unknown = tuple(task for task in job.tasks if _kind(task) not in ("perplexity", *_INSTANT))
    steps = [jobs_of(point.recipe, compute_dtype(point.recipe.dtype, model.device)) for point in points]
    baseline, copied = resident_bytes(), _copied(sizes, job)
    whole = Expected(
        points=len(points),
        clock=partial(_seconds, points, steps, job, sizes, model.dtype, dense=dense),
        unknown=(*unknown, *job.timed),
        available_memory=baseline + available_memory(),
        available_device_memory=available_on(job.device),
        copied=baseline + copied if on_processor(job.device) else copied,
    )
    every = []
    for point, several in zip(points, steps, strict=True):
        here, there = _peaks(sizes, several, job, baseline)
        every.append(replace(whole, largest=point.name, memory=here, device_memory=there))
    return next((one for one in every if one.problem), max(every, key=lambda one: one.memory))


def _seconds(
    points: Sequence[Point], steps: Sequence[list[Step]], job: Job, sizes: Sizes, dtype: torch.dtype, *, dense: bool
) -> float:
    measuring = try_measuring(sizes, dtype, job.device)

    def measured(tasks: Sequence[str], gone: float = 0.0) -> float:
        texts = sum(_kind(task) == "perplexity" for task in tasks)
        return texts * measuring_seconds(sizes, measuring, gone, job.windows, job.length)

    total = measured(job.tasks) if dense else 0.0
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
    return total


def _peaks(sizes: Sizes, steps: Sequence[Step], job: Job, baseline: int) -> tuple[int, int]:
    """What one point takes of a process that has ``baseline`` bytes, the dense model among them, and of its device."""
    here, there = [baseline], [_copied(sizes, job)]
    for number, step in enumerate(steps):
        found = memory(sizes, step, baseline)
        here.append(found.total)
        there.append(found.device_total + (sizes.stored if number else 0))
    if not on_processor(job.device):
        return max(here), max(there)
    # what a step before left, or what is measured, lies in this process, too
    return max(one + other for one, other in zip(here, there, strict=True)), 0


def _copied(sizes: Sizes, job: Job) -> int:
    """A copy of the model is cut, and measured as long as nearly all of it may be there."""
    row = sizes.vocabulary * sizes.itemsize
    return sizes.stored + windows_per_batch(row, job.length) * job.length * row


def announce_rest(
    sweep: Sweep, finished: Mapping[str, Record], pool: Pool, announce: Callable[[Expected], None] | None
) -> None:
    """Tell ``announce`` what is left of a grid that runs in this process; of a search nobody knows the points.

    Raises what ``announce`` raises.
    """
    if announce is None or sweep.search is not None or not isinstance(pool, InSequence):
        return
    left = [point for point in sweep.points if point.key not in finished]
    expected = None
    # a point that can't run, or a model that isn't there, is for the sweep itself to tell
    with suppress(SecateurError):
        if left:
            expected = pool.worker.expected(left, dense=DENSE not in finished)
    if expected is not None:
        announce(expected)


def _kind(task: str) -> str:
    return task.partition(":")[0]
