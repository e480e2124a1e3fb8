"""``secateur compare``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from secateur.cli.options import (
    Address,
    Aim,
    Allocate,
    Calibration,
    ComputeDevice,
    ComputeDtype,
    ExpectedFirst,
    Heal,
    Json,
    Length,
    Overwrite,
    Partial,
    Plugins,
    Quiet,
    Resume,
    Samples,
    TrustRemoteCode,
    Windows,
    absolute,
    check_resume,
    load_plugins,
)
from secateur.cli.output import print_json, show, show_notes, working
from secateur.cli.prune import given
from secateur.cli.sweep import fail
from secateur.errors import UsageError

if TYPE_CHECKING:
    from secateur.comparison import Comparison


def compare(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="As for 'prune'.")],
    methods: Annotated[
        str | None,
        typer.Option(metavar="NAME[:KEY=VALUE,...],...", help="Two or more: flap,osscar,wanda_sp:heal=refit."),
    ] = None,
    sparsity: Annotated[str, typer.Option(metavar="S,...", help="Fractions removed, in (0, 1).")] = "0.2",
    seeds: Annotated[
        str,
        typer.Option(metavar="N,...", help="Each draws the calibration text anew; three show how sure a verdict is."),
    ] = "0",
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--tasks",
            metavar="TASK,...",
            help="What to measure, as 'evaluate --task' (default perplexity:builtin); the first says who is best; "
            "repeatable.",
        ),
    ] = None,
    latency: Annotated[
        bool, typer.Option("--latency", help="Measure a request as well, in turns with the dense model.")
    ] = False,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Folder for page, JSON and plans.")] = None,
    allocate: Allocate = None,
    partial: Partial = False,
    heal: Heal = None,
    target: Aim = None,
    calibration: Calibration = None,
    samples: Samples = None,
    length: Length = None,
    windows: Windows = None,
    dtype: ComputeDtype = None,
    device: ComputeDevice = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            metavar="FRACTION",
            help="By how much of the blocks' weights a method may miss the sparsity, and still have a part in the "
            "verdict (default 0.01).",
        ),
    ] = None,
    workers: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            help="Processes of Ray that take a point each at the same time, with a copy of the model, on a GPU of its "
            "own where --device is cuda; 1 without --address works in sequence and without Ray.",
        ),
    ] = 1,
    address: Address = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    estimate: ExpectedFirst = True,
    trust_remote_code: TrustRemoteCode = False,
    plugin: Plugins = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    if methods is None:
        raise UsageError("name the methods with --methods flap,osscar ('secateur methods' lists them)")
    if out is None:
        raise UsageError("give a folder for the comparison with --out")
    check_resume(resume, overwrite)
    load_plugins(plugin)
    from secateur.cli.estimate import announce_points
    from secateur.comparison import compare as run
    from secateur.comparison.asked import split

    options = {
        "allocate": allocate,
        "partial": partial or None,
        "heal": heal,
        "target": target,
        "calibration": calibration,
        "samples": samples,
        "length": length,
        "windows": windows,
        "dtype": dtype,
        "device": device,
        "tolerance": tolerance,
        "tasks": [task for text in tasks for task in split(text)] if tasks else None,
    }
    budgets, drawn = _numbers("--sparsity", sparsity, float), _numbers("--seeds", seeds, int)
    with working(quiet) as progress:
        comparison = run(
            model,
            methods=split(methods),
            sparsity=budgets,
            seeds=drawn,
            latency=latency,
            workers=workers,
            address=address,
            out=out,
            resume=resume,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            plugins=absolute(plugin or []),
            progress=progress,
            announce=announce_points(quiet, estimate),
            **given(options),
        )
    show_notes(comparison.notes, quiet)
    _show(comparison, out, json)
    fail(comparison.results)


def _numbers(option: str, text: str, kind: type) -> list:
    """``0.2,0.4`` → two numbers. Raises UsageError."""
    try:
        return [kind(one) for one in text.split(",")]
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise UsageError(f"{option} takes {what} with commas between them, got '{text}'") from None


def _show(comparison: Comparison, out: Path, json: bool) -> None:
    if json:
        print_json({"output": str(out), **comparison.to_dict()})
        return
    from secateur.comparison.table import caption, columns, width_of
    from secateur.report.tables import rows_table

    header, rows = columns(comparison)
    show(
        rows_table(header, rows, words=3, caption=caption(comparison)),
        *(verdict.sentence for verdict in comparison.first_verdicts),
        f"compare.html, compare.json and the plan of every point are in {out}",
        least=width_of(header, rows),
    )
