"""``secateur estimate``, and the line that ``secateur prune`` says first."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secateur.cli.options import (
    ActivationMemory,
    Aim,
    Allocate,
    Budget,
    ComputeDevice,
    ComputeDtype,
    Effort,
    Growth,
    Heal,
    Json,
    Length,
    MethodName,
    MethodOptions,
    Partial,
    Pattern,
    Plugins,
    Quiet,
    RecipeFile,
    Revision,
    Samples,
    Sparsity,
    Stages,
    StoredFormat,
    TrustRemoteCode,
    Uniform,
    joined,
    load_plugins,
)
from secateur.cli.output import print_json, show, working
from secateur.cli.prune import build_recipe, given, own_options
from secateur.errors import UsageError
from secateur.ranks import join

if TYPE_CHECKING:
    from secateur.estimate.result import Estimate
    from secateur.recipes import Recipe
    from secateur.sweep.expected import Expected


def estimate(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="As for 'prune'; a folder needs no more than a config.json."),
    ] = None,
    method: MethodName = None,
    sparsity: Sparsity = None,
    pattern: Pattern = None,
    budget: Budget = None,
    allocate: Allocate = None,
    partial: Partial = False,
    heal: Heal = None,
    target: Aim = None,
    stages: Stages = None,
    growth: Growth = None,
    effort: Effort = None,
    uniform: Uniform = False,
    recipe: RecipeFile = None,
    options: MethodOptions = None,
    samples: Samples = None,
    length: Length = None,
    dtype: ComputeDtype = None,
    device: ComputeDevice = None,
    activation_memory: ActivationMemory = None,
    format: StoredFormat = None,
    out: Annotated[
        str | None, typer.Option("--out", metavar="DIR", help="Where the checkpoint would go: is there room for it?")
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option("--memory", metavar="SIZE", help="Memory that there is (default: what is free here now)."),
    ] = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    plugin: Plugins = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    load_plugins(plugin)
    step = {"method": method, "sparsity": sparsity, "pattern": pattern, "budget": joined(budget), "allocate": allocate}
    step |= {"heal": heal, "target": target, "stages": stages, "growth": growth, "partial": partial or None}
    top = {
        "model": model,
        "revision": revision,
        "out": out or None,
        "dtype": dtype,
        "device": device,
        "format": format,
        "activation_memory": activation_memory,
    }
    data = {"samples": samples, "length": length}
    own = own_options(options, uniform=uniform, effort=effort)
    job = build_recipe(recipe, given(top), given(data), given(step), own, trust_remote_code)
    if job.model is None:
        raise UsageError("name a model: a hub id, a folder, a .gguf file or smollm2-135m")
    job.check_methods()
    with working(quiet) as progress:
        found = _estimate(job, memory, trust_remote_code, progress)
    from secateur.estimate.build import check

    if json:
        print_json(found.to_dict())
    else:
        from secateur.estimate.table import estimate_table

        show(estimate_table(found))
    check(found)


def _estimate(job: Recipe, memory: str | None, trust_remote_code: bool, progress: Any) -> Any:
    from secateur.estimate.build import estimate_run
    from secateur.estimate.outline import outline
    from secateur.models.loading import device_of
    from secateur.models.shards import parse_size
    from secateur.observe.precision import compute_dtype

    assert job.model is not None
    limit = parse_size(memory) if memory else None
    spill = parse_size(job.activation_memory) if job.activation_memory else None
    sizes, files = outline(job.model, revision=job.revision, trust_remote_code=trust_remote_code, progress=progress)
    return estimate_run(
        job,
        sizes,
        compute_dtype(job.dtype, device_of(job.device)),
        activation_memory=spill,
        files=files,
        place=place_of(job.out),
        memory_limit=limit,
        # what a process of its own spends on starting is over by now
        startup=time.process_time(),
    )


def place_of(out: str | None) -> Path | None:
    """Where the output is written; a URL gets what was written here first."""
    from secateur.remote import is_url, place
    from secateur.runs.folder import run_path

    if out is None:
        return None
    return run_path(out) if is_url(out) else Path(place(out))


def announce(found: Estimate | Expected, quiet: bool) -> None:
    """Say on stderr what a run, or the points of a sweep, will take. Raises ResourceError when that can't fit."""
    from secateur.estimate.build import check

    check(found)
    if not quiet:
        print(f"estimate: {found.line()}", file=sys.stderr, flush=True)


def announce_points(quiet: bool, wanted: bool = True) -> Callable[[Expected], None] | None:
    """``announce`` for the points of a sweep; None where that isn't ``wanted``."""
    return partial(announce, quiet=quiet) if wanted else None


class Announcement:
    """Says on stderr what a run will take, before it begins. Raises ResourceError when that is more than there is."""

    def __init__(self, job: Recipe, quiet: bool) -> None:
        self._job, self._quiet = job, quiet

    def __call__(self, source: Any, dtype: Any) -> None:
        from secateur.estimate.build import estimate_run
        from secateur.estimate.sizes import sizes_of
        from secateur.models.shards import parse_size

        job, folder = self._job, source.folder
        found = estimate_run(
            job,
            sizes_of(source),
            dtype,
            activation_memory=parse_size(job.activation_memory) if job.activation_memory else None,
            files=sorted(folder.glob("*.safetensors")) if folder is not None else (),
            place=place_of(job.out),
            ranks=join(),
        )
        announce(found, self._quiet)
