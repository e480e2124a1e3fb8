"""What would make a run fit: the first change, from those that leave the result alone to another method, that does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch

from secateur.errors import SecateurError
from secateur.estimate.disk import disk
from secateur.estimate.job import Job
from secateur.estimate.memory import hidden_bytes, memory, spills
from secateur.estimate.sizes import Sizes
from secateur.healing.recovery import RecoveryOptions
from secateur.methods import Preset, get_method, list_methods, make_method
from secateur.report.numbers import format_bytes

_SPILL_FROM = {"1GB": 10**9, "256MB": 256 * 10**6, "64MB": 64 * 10**6}
_FEWEST_SAMPLES, _SHORTEST = 8, 128

PLACE = "give --out a place on a larger disk"

T = TypeVar("T")
Change = tuple[str, Job]


def for_memory(sizes: Sizes, job: Job, needed: Callable[[Job], int], limit: int) -> str:
    """The option that makes what is ``needed`` fit, the options that do together, or that none do."""
    return _first_that_fits(job, [partial(kind, sizes) for kind in _KINDS], needed, limit)


def for_training(options: RecoveryOptions, needed: Callable[[RecoveryOptions], int], limit: int) -> str:
    """The same for a training alone."""

    def named(kind: _Lighter, chosen: RecoveryOptions) -> Iterator[tuple[str, RecoveryOptions]]:
        for key, value, lighter in kind(chosen):
            yield f"--loss {value}" if key == "loss" else f"--set {key}={value}", lighter

    return _first_that_fits(options, [partial(named, kind) for kind in _LIGHTER], needed, limit)


def _first_that_fits(
    start: T, kinds: Sequence[Callable[[T], Iterator[tuple[str, T]]]], needed: Callable[[T], int], limit: int
) -> str:
    for text, changed in (change for kind in kinds for change in kind(start)):
        if needed(changed) <= limit:
            return f"{text} would make it fit ({format_bytes(needed(changed))})"
    # the most of every kind on top of each other; twice, because one may only help once another is done
    texts: dict[int, str] = {}
    least = start
    for place, kind in [*enumerate(kinds), *enumerate(kinds)]:
        # of equals the last, which still helps when what follows makes the rest smaller
        better = min(reversed(list(kind(least))), key=lambda change: needed(change[1]), default=None)
        if better is not None and needed(better[1]) < needed(least):
            texts[place] = better[0]
            least = better[1]
            if needed(least) <= limit:
                return f"{' with '.join(texts.values())} would make it fit ({format_bytes(needed(least))})"
    tried = f", not even {' with '.join(texts.values())} ({format_bytes(needed(least))})" if texts else ""
    return f"no option makes it fit{tried}"


def for_disk(sizes: Sizes, job: Job, limit: int) -> str:
    """``--format packed`` where that is enough, else another place."""
    packed = replace(job, format="packed")
    needed = sum(disk(sizes, packed).values())
    if needed <= limit and job.format != "packed":
        return f"--format packed would make it fit ({format_bytes(needed)})"
    return PLACE


def _spilling(sizes: Sizes, job: Job) -> Iterator[Change]:
    for text, size in _SPILL_FROM.items():
        if not spills(sizes, job) and hidden_bytes(sizes, job) > size:
            yield f"--activation-memory {text}", replace(job, activation_memory=size)


def _recovery(kind: _Lighter, sizes: Sizes, job: Job) -> Iterator[Change]:
    """Changes of one kind of the training of what is left."""
    for key, value, lighter in kind(job.recovery) if job.recovery is not None else ():
        yield f"{key}={value} in --heal", replace(job, recovery=lighter)


def _checkpointed(options: RecoveryOptions) -> Iterator[tuple[str, str, RecoveryOptions]]:
    if not options.checkpointing:
        yield "checkpointing", "true", replace(options, checkpointing=True)


def _in_parts(options: RecoveryOptions) -> Iterator[tuple[str, str, RecoveryOptions]]:
    for micro in range((options.micro or options.batch) - 1, 0, -1):
        if options.batch % micro == 0:
            yield "micro", str(micro), replace(options, micro=micro)


def _untaught(options: RecoveryOptions) -> Iterator[tuple[str, str, RecoveryOptions]]:
    if options.loss != "ce":
        yield "loss", "ce", replace(options, loss="ce")


def _narrower(sizes: Sizes, job: Job) -> Iterator[Change]:
    if job.observes and job.dtype.itemsize > 2:
        yield "--dtype bfloat16", replace(job, dtype=torch.bfloat16)


def _fewer(sizes: Sizes, job: Job) -> Iterator[Change]:
    samples = job.samples // 2
    while job.observes and samples >= _FEWEST_SAMPLES:
        yield f"--samples {samples}", replace(job, samples=samples)
        samples //= 2


def _shorter(sizes: Sizes, job: Job) -> Iterator[Change]:
    length = job.length // 2
    while job.observes and length >= _SHORTEST:
        yield f"--length {length}", replace(job, length=length)
        length //= 2


def _simpler(sizes: Sizes, job: Job) -> Iterator[Change]:
    """Methods that cut the same things by the same kind of data and take less, the hungriest first."""
    found, own = [], job.method.descriptor
    for name in list_methods(object=own.object, data=own.data, when=own.when):
        if issubclass(get_method(name), Preset):
            # what it stands for is on the list
            continue
        shared = {key: value for key, value in job.method.options().items() if key in get_method(name).option_fields()}
        keys = ("sparsity", "pattern", "budget", "layers")
        try:
            changed = replace(job, method=make_method(name, {key: shared[key] for key in keys if key in shared}))
        except SecateurError:
            continue
        found.append((memory(sizes, changed, 0).total, name, changed))
    for size, name, changed in sorted(found, key=lambda entry: entry[:2], reverse=True):
        if size < memory(sizes, job, 0).total:
            yield f"--method {name}", changed


_Lighter = Callable[[RecoveryOptions], Iterator[tuple[str, str, RecoveryOptions]]]
_LIGHTER: tuple[_Lighter, ...] = (_checkpointed, _in_parts, _untaught)
_KINDS: tuple[Callable[[Sizes, Job], Iterator[Change]], ...] = (
    _spilling,
    partial(_recovery, _checkpointed),
    partial(_recovery, _in_parts),
    _narrower,
    _fewer,
    _shorter,
    partial(_recovery, _untaught),
    _simpler,
)
"""from those that leave the result alone to those that change it most"""
