"""The estimate of a whole recipe."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch

from secateur.errors import ResourceError
from secateur.estimate import remedies
from secateur.estimate.disk import checkpoint_bytes, disk, speed_bound
from secateur.estimate.job import Job
from secateur.estimate.machine import (
    Machine,
    available_on,
    free_disk,
    resident_bytes,
    try_machines,
    try_training,
)
from secateur.estimate.memory import Memory, memory, training_memory
from secateur.estimate.result import Estimate, StepEstimate
from secateur.estimate.sizes import Sizes
from secateur.estimate.training import Training
from secateur.estimate.work import flops, seconds, training_seconds
from secateur.healing.recovery import RecoveryOptions, split_heal
from secateur.memory import available_memory
from secateur.methods import reach
from secateur.ranks import ALONE, Ranks
from secateur.recipes import Recipe


def estimate_run(
    recipe: Recipe,
    sizes: Sizes,
    dtype: torch.dtype,
    *,
    activation_memory: int | None = None,
    files: Iterable[Path] = (),
    place: Path | None = None,
    memory_limit: int | None = None,
    startup: float = 0.0,
    ranks: Ranks = ALONE,
) -> Estimate:
    """What ``recipe`` takes on a model of these sizes, after a trial of this machine of about two seconds.

    ``files`` are the weights, where they are here; the output goes to ``place``. ``memory_limit`` stands for what is
    available, all in bytes. ``startup`` seconds have passed already. Steps after the first are counted at the
    sizes of the dense model. Windows and trainings are shared by the ``ranks``, and memory by those of this machine;
    operations and seconds are those of one of them.
    """
    recipe.check_reach(sizes.anatomy)
    jobs = jobs_of(recipe, dtype, activation_memory, ranks.size)
    machines = try_machines(sizes, jobs, files, place)
    baseline = resident_bytes()
    limit = memory_limit if memory_limit is not None else _there(baseline, ranks)
    steps = tuple(estimate_step(sizes, job, machine, baseline) for job, machine in zip(jobs, machines, strict=True))
    after, speed = sizes.stored, 1.0
    for job in jobs:
        after = int(after * checkpoint_bytes(sizes, job) / sizes.stored)
        speed *= speed_bound(sizes, job)
    found = Estimate(
        model=recipe.model or "the model",
        dtype=str(dtype).removeprefix("torch."),
        steps=steps,
        available_memory=limit,
        available_device_memory=available_on(recipe.device),
        free_disk=free_disk(place) if place is not None else None,
        startup=startup,
        bytes_before=sizes.stored,
        bytes_after=after,
        speed_bound=speed,
        ranks=ranks.here,
    )
    return _with_remedy(found, sizes, jobs, baseline)


def estimate_training(
    name: str, training: Training, *, files: Iterable[Path] = (), place: Path | None = None, ranks: Ranks = ALONE
) -> Estimate:
    """What a training alone takes, after a short trial of this machine; ``files`` are its model's weights.

    It is one of ``ranks``, whose number it knows; those of this machine share its memory.
    """
    machine, baseline = try_training(training, files, place), resident_bytes()
    peak = training_memory(training, baseline)
    step = StepEstimate(
        method="heal",
        memory=peak.process,
        device_memory=peak.device,
        disk={"checkpoint": training.sizes.stored, "recovery": 2 * training.state_bytes},
        flops={"heal": training.flops() + training.measured_flops()},
        seconds=training_seconds(training, machine),
    )
    found = Estimate(
        model=name,
        dtype=str(training.dtype).removeprefix("torch."),
        steps=(step,),
        available_memory=_there(baseline, ranks),
        available_device_memory=available_on(training.device),
        free_disk=free_disk(place) if place is not None else None,
        startup=0.0,
        bytes_before=training.sizes.stored,
        bytes_after=training.sizes.stored,
        speed_bound=1.0,
        work="training",
        ranks=ranks.here,
    )

    def taken(options: RecoveryOptions) -> Memory:
        return training_memory(training.lighter(options), baseline)

    for fits, limit, needed in (
        (found.fits_memory, found.available_memory, lambda options: taken(options).total),
        (found.fits_device, found.available_device_memory, lambda options: taken(options).device_total),
    ):
        if not fits and limit is not None:
            return replace(found, remedy=remedies.for_training(training.options, needed, limit))
    return found if found.fits_disk else replace(found, remedy=remedies.PLACE)


def estimate_step(sizes: Sizes, job: Job, machine: Machine, baseline: int) -> StepEstimate:
    """What one step takes in a process that has ``baseline`` bytes in memory."""
    peak, coverage = memory(sizes, job, baseline), reach(job.method, sizes.anatomy)
    return StepEstimate(
        method=job.method.name,
        reach="" if coverage is None else f"{job.method.name} {coverage.sentence}",
        memory=peak.process,
        device_memory=peak.device,
        disk=disk(sizes, job),
        flops=flops(sizes, job),
        seconds=seconds(sizes, job, machine),
    )


class Judged(Protocol):
    """What is expected of some work; ``problem`` says why it can't fit, and is empty when it does."""

    @property
    def problem(self) -> str: ...


def check(estimate: Judged) -> None:
    """Raise ResourceError with what would make it fit, when it doesn't."""
    if problem := estimate.problem:
        raise ResourceError(problem)


def jobs_of(recipe: Recipe, dtype: torch.dtype, activation_memory: int | None = None, ranks: int = 1) -> list[Job]:
    """The steps of a recipe as they are estimated."""
    last = len(recipe.steps)
    words = [(*recipe.words(step), split_heal(step.heal)[1]) for step in recipe.steps]
    return [
        Job(
            method=method,
            allocation=allocation,
            samples=recipe.calibration.samples,
            length=recipe.calibration.length,
            dtype=dtype,
            activation_memory=activation_memory,
            format=recipe.format if number == last else "dense",
            device=recipe.device,
            recovery=recovery,
            ranks=ranks,
        )
        for number, (method, allocation, recovery) in enumerate(words, start=1)
    ]


def _there(baseline: int, ranks: Ranks) -> int:
    """Bytes that this process can have, which has ``baseline`` by now; so have the others of this machine."""
    return baseline + available_memory() // ranks.here


def _with_remedy(found: Estimate, sizes: Sizes, jobs: list[Job], baseline: int) -> Estimate:
    for fits, limit, needed in (
        (found.fits_memory, found.available_memory, lambda job: memory(sizes, job, baseline).total),
        (found.fits_device, found.available_device_memory, lambda job: memory(sizes, job, baseline).device_total),
    ):
        if not fits and limit is not None:
            return replace(found, remedy=remedies.for_memory(sizes, max(jobs, key=needed), needed, limit))
    if not found.fits_disk and found.free_disk is not None:
        before = found.disk_bytes - sum(disk(sizes, jobs[-1]).values())
        return replace(found, remedy=remedies.for_disk(sizes, jobs[-1], found.free_disk - before))
    return found
