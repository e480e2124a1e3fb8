"""``secateur prune``."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secateur.cli.measuring import Measurement
from secateur.cli.network import NETWORK, NetworkJob, prune_network
from secateur.cli.options import (
    ActivationMemory,
    Aim,
    Allocate,
    AllowPickle,
    Budget,
    Calibration,
    ComputeDevice,
    ComputeDtype,
    Effort,
    EstimateFirst,
    Growth,
    Heal,
    Ignore,
    Inputs,
    Json,
    LatencyTableFile,
    Length,
    MaxShardSize,
    MethodName,
    MethodOptions,
    Overwrite,
    Partial,
    Pattern,
    Plugins,
    Quiet,
    RecipeFile,
    Resume,
    Revision,
    Samples,
    Seed,
    Sparsity,
    Stages,
    StoredFormat,
    TrustRemoteCode,
    Uniform,
    Windows,
    joined,
    load_plugins,
    only_for,
)
from secateur.cli.output import print_json, show, show_notes, working
from secateur.cli.saving import check_push, drawn, how_to_load, push
from secateur.errors import UsageError
from secateur.networks.kinds import is_named_network
from secateur.ranks import join
from secateur.runs.finished import check_run_output

if TYPE_CHECKING:
    from secateur.recipes import Recipe
    from secateur.report import Report


# options that count for traced networks, and those that count for them alone
_NETWORK_OPTIONS = {"model", "method", "sparsity", "budget", "out", "options", "seed", "report", "evaluate"}
_NETWORK_OPTIONS |= {"dry_run", "overwrite", "latency_table"}
_NETWORK_ONLY = {"input", "ignore", "data", "loss"}
_ALWAYS = {"plugin", "json", "quiet"}


def prune(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="Language model: hub id, folder, .gguf file, built-in name (smollm2-135m). "
            "Any other network: .onnx file, package.module:function or file.py:function that makes a torch module.",
        ),
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
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            metavar="DIR|URL|FILE",
            help="Folder for the checkpoint, or s3://bucket/folder; of a traced network also a .onnx or .pt2 file.",
        ),
    ] = None,
    recipe: RecipeFile = None,
    options: MethodOptions = None,
    calibration: Calibration = None,
    samples: Samples = None,
    length: Length = None,
    seed: Seed = None,
    text_field: Annotated[
        str | None, typer.Option("--text-field", metavar="NAME", help="Field of a jsonl or parquet file with the text.")
    ] = None,
    dtype: ComputeDtype = None,
    device: ComputeDevice = None,
    devices: Annotated[
        str | None, typer.Option(metavar="NAME,NAME", help="Spread the blocks over these devices: cuda:0,cuda:1.")
    ] = None,
    evaluate: Annotated[
        list[str] | None,
        typer.Option(
            "--evaluate", metavar="TASK", help="What to measure beside size, as 'evaluate --task'; repeatable."
        ),
    ] = None,
    windows: Windows = None,
    format: StoredFormat = None,
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Prompt that both models continue.", show_default=False)
    ] = None,
    report: Annotated[
        bool | None, typer.Option("--report/--no-report", help="Write report.html beside the checkpoint (default).")
    ] = None,
    measure: Annotated[
        bool | None,
        typer.Option(
            "--measure/--no-measure",
            help="Load both models to measure them (default: when --evaluate or --prompt asks, or below 2 GB).",
            show_default=False,
        ),
    ] = None,
    resume: Resume = False,
    max_shard_size: MaxShardSize = None,
    activation_memory: ActivationMemory = None,
    estimate: EstimateFirst = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would go; write nothing.")] = False,
    overwrite: Overwrite = False,
    push_to_hub: Annotated[
        str | None, typer.Option("--push-to-hub", metavar="OWNER/NAME", help="Upload the finished checkpoint as well.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make the repository on the hub a private one.")] = False,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    input: Inputs = None,
    ignore: Ignore = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="MODULE:NAME",
            help="Batches for a traced network, or a function that returns them, for methods that look at data.",
        ),
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option(
            "--loss",
            metavar="MODULE:NAME",
            help="Function of module and batch (default: cross-entropy of a classifier).",
        ),
    ] = None,
    latency_table: LatencyTableFile = None,
    uniform: Uniform = False,
    plugin: Plugins = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    if is_named_network(model):
        only_for(NETWORK, context, _NETWORK_OPTIONS | _NETWORK_ONLY | _ALWAYS, "language models")
        load_plugins(plugin)
        job = NetworkJob(
            model or "",
            method=method,
            sparsity=sparsity,
            budget=joined(budget),
            out=out,
            options=parse_options(options or []),
            seed=seed or 0,
            inputs=input or [],
            ignore=ignore or [],
            data=data,
            loss=loss,
            evaluate=list(dict.fromkeys(evaluate or [])),
            latency_table=latency_table,
        )
        html = drawn(report)
        prune_network(job, html=html, dry_run=dry_run, overwrite=overwrite, json=json, quiet=quiet)
        return
    everything = {str(parameter.name) for parameter in context.command.params}
    only_for("a language model", context, everything - _NETWORK_ONLY, "traced networks")
    step = {"method": method, "sparsity": sparsity, "pattern": pattern, "budget": joined(budget), "allocate": allocate}
    step |= {"heal": heal, "target": target, "stages": stages, "growth": growth, "partial": partial or None}
    calibrate = {"source": calibration, "samples": samples, "length": length, "seed": seed, "text_field": text_field}
    top = {
        "model": model,
        "revision": revision,
        "out": out or None,
        "dtype": dtype,
        "device": device,
        "devices": devices.split(",") if devices else None,
        "evaluate": evaluate or None,
        "windows": windows,
        "format": format,
        "max_shard_size": max_shard_size,
        "activation_memory": activation_memory,
        "latency_table": str(latency_table) if latency_table else None,
    }
    own = own_options(options, uniform=uniform, effort=effort)
    ranks = join()
    with ranks.together(), working(quiet or not ranks.main) as progress:
        load_plugins(plugin)
        job = build_recipe(recipe, given(top), given(calibrate), given(step), own, trust_remote_code)
        html = _check(job, dry_run=dry_run, resume=resume, overwrite=overwrite, report=report)
        ranks.on_main(lambda: check_push(push_to_hub, job.out, private=private, overwrite=overwrite))
        if dry_run and ranks.size > 1:
            raise UsageError(f"--dry-run is for one process, and here are {ranks.size}: leave torchrun out")
        # from here on it takes the heavy libraries
        from secateur.cli.estimate import Announcement
        from secateur.runs.run import Options, planned, run_recipe

        measurement = Measurement(
            job, progress, measure=measure, prompt=prompt, sample=html, trust_remote_code=trust_remote_code
        )
        how = Options(
            resume=resume,
            overwrite=overwrite,
            html=html,
            trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
            # a run that goes on has begun to fill the disk, and has fitted before
            announce=Announcement(job, quiet) if estimate and not resume else None,
            progress=progress,
            check=measurement.check,
            measure=measurement,
        )
        if not dry_run:
            done = run_recipe(job, how)
            url = ranks.on_main(lambda: _push(job, push_to_hub, private=private, overwrite=overwrite))
    if dry_run:
        with ExitStack() as temporary:
            with working(quiet) as progress:
                plans = temporary.enter_context(planned(job, replace(how, progress=progress)))
            _show_dry_run(plans, json)
        return
    if ranks.main:
        show_notes(done.notes, quiet)
        _show_outcome(job, done, json, url)


def build_recipe(
    path: Path | None,
    top: dict[str, Any],
    calibration: dict[str, Any],
    step: dict[str, Any],
    options: dict[str, str],
    trust_remote_code: bool = False,
) -> Recipe:
    """The recipe of the file with the values of the command line put over it. Raises UsageError."""
    from secateur.recipes import make_recipe, read_recipe
    from secateur.usercode import check_trusted

    data = read_recipe(path) if path else {}
    if path:
        make_recipe(data, str(path))
        # what the command line replaces comes from the user and not from the file
        theirs = make_recipe({key: value for key, value in data.items() if key not in top}, str(path))
        check_trusted(theirs.code(), str(path), trust_remote_code)
    elif "method" not in step:
        raise UsageError("name a method with --method ('secateur methods' lists them), or a recipe with --recipe")
    steps = data.get("steps", [{}])
    if (step or options) and len(steps) > 1:
        raise UsageError(
            f"{path} has {len(steps)} steps; change method, sparsity and options there, not on the command line"
        )
    if step or options:
        steps = [_override(steps[0], step, options)]
    calibration = {**data.get("calibration", {}), **calibration}
    return make_recipe({**data, **top, "calibration": calibration, "steps": steps}, "command line")


def parse_options(pairs: list[str]) -> dict[str, str]:
    """``key=value`` pairs as a mapping. Raises UsageError for anything else, and for a key given twice."""
    options: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise UsageError(f"--set takes KEY=VALUE, got '{pair}'")
        if key in options:
            raise UsageError(f"--set {key} is given twice")
        options[key] = value
    return options


def own_options(pairs: list[str] | None, *, uniform: bool = False, effort: str | None = None) -> dict[str, str]:
    """The options of the method: those of --set, and those that have a flag of their own. Raises UsageError."""
    options, flags = parse_options(pairs or []), given({"uniform": "true" if uniform else None, "effort": effort})
    if twice := [name for name in flags if name in options]:
        raise UsageError(f"--{twice[0]} and --set {twice[0]} say the same: give one of them")
    return {**options, **flags}


def _override(old: dict[str, Any], step: dict[str, Any], options: dict[str, str]) -> dict[str, Any]:
    merged = {**old, **step}
    if step.get("method", old.get("method")) != old.get("method"):
        # another method has other options
        merged["options"] = options
    else:
        merged["options"] = {**old.get("options", {}), **options}
    # sparsity and pattern say the same thing: the command line's word counts
    for given, other in (("sparsity", "pattern"), ("pattern", "sparsity")):
        if given in step and other not in step:
            merged.pop(other, None)
    return merged


def given(values: dict[str, Any]) -> dict[str, Any]:
    """The options that were given."""
    return {key: value for key, value in values.items() if value is not None}


def _check(job: Recipe, *, dry_run: bool, resume: bool, overwrite: bool, report: bool | None) -> bool:
    """Refuse what can't work before a model is loaded; returns whether report.html will be written."""
    if job.model is None:
        raise UsageError("name a model: a hub id, a folder, a .gguf file or smollm2-135m")
    if job.out is None and not dry_run:
        raise UsageError("give a folder for the checkpoint with --out, or --dry-run to see what would go")
    if job.out is not None and not dry_run:
        check_run_output(job.out, resume=resume, overwrite=overwrite)
    job.check_methods()
    from secateur.evaluation import make_task

    for task in job.evaluate:
        make_task(task)
    return drawn(report)


def _push(job: Recipe, repo_id: str | None, *, private: bool, overwrite: bool) -> str | None:
    return push(job.out, repo_id, private=private, overwrite=overwrite) if repo_id and job.out else None


def _show_dry_run(plans: list[Any], json: bool) -> None:
    from secateur.cli.plan import plan_document, show_plans

    if json:
        print_json({"dry_run": True, "plans": [plan_document(plan) for plan in plans]})
    else:
        show_plans(plans)


def _show_outcome(job: Recipe, report: Report, json: bool, url: str | None) -> None:
    from secateur.report.recovery import summary
    from secateur.report.speeds import decode_sentence
    from secateur.report.tables import metrics_table

    if json:
        print_json({**report.to_dict(), **({"hub": url} if url else {})})
        return
    show(metrics_table(report.metrics), *([report.reach] if report.reach else []))
    show(*(summary(recovery) for recovery in report.recoveries))
    if why := decode_sentence(report.metrics):
        show(why)
    for sample in report.samples:
        show(*(f"{name}: {sample.prompt}{text}\n" for name, text in sample.outputs.items()))
    assert job.out is not None
    show(how_to_load(job.out))
    if url:
        show(f"pushed to {url}")
