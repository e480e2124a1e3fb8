"""What would make a run fit: the first change, from those that leave the result alone to another method, that does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from secateur.errors import SecateurError
from secateur.estimate.disk import disk
from secateur.estimate.job import Job
from secateur.estimate.memory import hidden_bytes, memory, spills
from secateur.estimate.sizes import Sizes
from secateur.methods import Preset, get_method, list_methods, make_method
from secateur.report.numbers import format_bytes

_SPILL_FROM = {"1GB": 10**9, "256MB": 256 * 10**6, "64MB": 64 * 10**6}
_FEWEST_SAMPLES, _SHORTEST = 8, 128

Change = tuple[str, Job]


def for_memory(sizes: Sizes, job: Job, needed: Callable[[Job], int], limit: int) -> str:
    """The option that makes what is ``needed`` fit, the options that do together, or that none do."""
    for text, changed in (change for kind in _KINDS for change in kind(sizes, job)):
        if needed(changed) <= limit:
            return f"{text} would make it fit ({format_bytes(needed(changed))})"
    # the most of every kind on top of each other; twice, because one may only help once another is done
    texts: dict[str, str] = {}
    least = job
    for kind in (*_KINDS, *_KINDS):
        # of equals the last, which still helps when what follows makes the rest smaller
        better = min(reversed(list(kind(sizes, least))), key=lambda change: needed(change[1]), default=None)
        if better is not None and needed(better[1]) < needed(least):
            texts[better[0].split()[0]] = better[0]
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
    return "give --out a place on a larger disk"


def _spilling(sizes: Sizes, job: Job) -> Iterator[Change]:
    for text, size in _SPILL_FROM.items():
        if not spills(sizes, job) and hidden_bytes(sizes, job) > size:
            yield f"--activation-memory {text}", replace(job, activation_memory=size)


def _checkpointed(sizes: Sizes, job: Job) -> Iterator[Change]:
    if job.recovery is not None and not job.recovery.checkpointing:
        yield "checkpointing=true in --heal", _trained(job, checkpointing=True)


def _in_parts(sizes: Sizes, job: Job) -> Iterator[Change]:
    if job.recovery is None:
        return
    together = job.recovery.micro or job.recovery.batch
    for micro in range(together - 1, 0, -1):
        if job.recovery.batch % micro == 0:
            yield f"micro={micro} in --heal", _trained(job, micro=micro)


def _untaught(sizes: Sizes, job: Job) -> Iterator[Change]:
    if job.recovery is not None and set(job.recovery.terms(teacher=True)) != {"ce"}:
        yield "loss=ce in --heal", _trained(job, loss="ce")


def _trained(job: Job, **options: Any) -> Job:
    assert job.recovery is not None
    return replace(job, recovery=replace(job.recovery, **options))


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


_KINDS: tuple[Callable[[Sizes, Job], Iterator[Change]], ...] = (
    _spilling,
    _checkpointed,
    _in_parts,
    _narrower,
    _fewer,
    _shorter,
    _untaught,
    _simpler,
)
"""from those that leave the result alone to those that change it most"""
