"""``secateur curve``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secateur.cli.options import (
    Allocate,
    Budget,
    Calibration,
    ComputeDevice,
    ComputeDtype,
    Effort,
    ExpectedFirst,
    Json,
    Length,
    MethodName,
    MethodOptions,
    Overwrite,
    Partial,
    Plugins,
    Quiet,
    Resume,
    Samples,
    Seed,
    TrustRemoteCode,
    Windows,
    check_resume,
    joined,
    load_plugins,
)
from secateur.cli.output import print_json, show, show_notes, working
from secateur.cli.prune import given, own_options
from secateur.cli.sweep import fail
from secateur.errors import UsageError

if TYPE_CHECKING:
    from secateur.sweep.expected import Expected
    from secateur.sweep.runner import Results
    from secateur.sweep.spec import Sweep

DEFAULT_POINTS = 6


def curve(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="As for 'prune'.")],
    method: MethodName = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Folder for curve and plans.")] = None,
    sparsities: Annotated[
        str,
        typer.Option(
            metavar="LOW:HIGH|S,S,...", help="The range that is looked at, or the sparsities themselves that are run."
        ),
    ] = "0.1:0.8",
    points: Annotated[
        int, typer.Option(min=2, metavar="N", help="Sparsities of a range that are run; those between are predicted.")
    ] = DEFAULT_POINTS,
    within: Annotated[
        float | None,
        typer.Option(
            metavar="FACTOR",
            help="Recommend the largest sparsity whose perplexity stays within this factor of the dense one (default: "
            "the knee, where the curve lies furthest below the line from its first to its last point, both axes scaled "
            "to [0, 1], perplexity by its logarithm).",
        ),
    ] = None,
    budget: Budget = None,
    allocate: Allocate = None,
    partial: Partial = False,
    options: MethodOptions = None,
    effort: Effort = None,
    calibration: Calibration = None,
    samples: Samples = None,
    length: Length = None,
    seed: Seed = None,
    dtype: ComputeDtype = None,
    device: ComputeDevice = None,
    evaluate: Annotated[
        list[str] | None,
        typer.Option(
            "--evaluate",
            metavar="TASK",
            help="What to measure, as 'evaluate --task' (default perplexity:builtin); the first decides, and each gets "
            "a curve; repeatable.",
        ),
    ] = None,
    windows: Windows = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    estimate: ExpectedFirst = True,
    trust_remote_code: TrustRemoteCode = False,
    plugin: Plugins = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    if method is None:
        raise UsageError("name a method with --method ('secateur methods' lists them)")
    if out is None:
        raise UsageError("give a folder for the curve with --out")
    check_resume(resume, overwrite)
    if within is not None and not within > 1:
        raise UsageError(f"--within is a factor above 1, got {within:g}: 1.2 allows a fifth more perplexity")
    load_plugins(plugin)
    own = own_options(options, effort=effort)
    step = {
        "method": method,
        "budget": joined(budget),
        "allocate": allocate,
        "partial": partial or None,
        "options": own,
    }
    data = {"source": calibration, "samples": samples, "length": length, "seed": seed}
    recipe = {
        "model": model,
        "steps": [given(step)],
        "calibration": given(data),
        **given({"dtype": dtype, "device": device, "evaluate": evaluate or None, "windows": windows}),
    }
    asked = _sweep(recipe, parse_sparsities(sparsities, points))
    from secateur.cli.estimate import announce_points
    from secateur.evaluation import make_task

    for task in asked.base.evaluate:
        make_task(task)
    with working(quiet) as progress:
        results, curves, lacking = _run(
            asked,
            recipe,
            out,
            resume,
            overwrite,
            trust_remote_code,
            plugin or [],
            within,
            progress,
            announce_points(quiet, estimate),
        )
    show_notes([*results.notes, *lacking, *_write(results, curves, out)], quiet)
    _show(results, curves, out, json)
    fail(results)


def parse_sparsities(text: str, points: int) -> list[float]:
    """``0.1:0.8`` → so many sparsities from one to the other; ``0.3,0.5`` → these. Raises UsageError."""
    try:
        low, colon, high = text.partition(":")
        if colon:
            first, last = float(low), float(high)
            found = [round(first + (last - first) * i / (points - 1), 4) for i in range(points)]
        else:
            found = [float(one) for one in text.split(",")]
    except ValueError:
        raise UsageError(f"--sparsities takes LOW:HIGH or S,S,... in (0, 1), got '{text}'") from None
    found = sorted(set(found))
    if len(found) < 2 or not (found[0] > 0 and found[-1] < 1):
        raise UsageError(f"--sparsities takes two or more different ones in (0, 1), the lower first, got '{text}'")
    return found


def _sweep(recipe: dict[str, Any], sparsities: list[float]) -> Sweep:
    from secateur.sweep.spec import make_sweep

    return make_sweep({**recipe, "sweep": {"grid": {"sparsity": sparsities}}}, "command line")


def _run(
    asked: Sweep,
    recipe: dict[str, Any],
    out: Path,
    resume: bool,
    overwrite: bool,
    trust_remote_code: bool,
    plugins: list[str],
    within: float | None,
    progress: Any,
    announce: Callable[[Expected], None] | None,
) -> tuple[Results, list[Any], list[str]]:
    """Run the points, then the setting that they recommend, so that what was expected there meets what is.

    Returns notes on what there is no curve of as well.
    """
    from secateur.sweep.curve import curve_of, predicted_at, quality_metrics
    from secateur.sweep.expected import announce_rest
    from secateur.sweep.pools import InSequence
    from secateur.sweep.runner import make_job, open_journal, resumable, run_sweep

    job = make_job(asked, out, trust_remote_code=trust_remote_code, plugins=tuple(plugins))
    journal, finished = open_journal(out, job, resume=resume, overwrite=overwrite)
    pool = InSequence(job)
    try:
        with resumable(journal, asked):
            announce_rest(asked, finished, pool, announce)
            results = run_sweep(asked, pool, journal, finished, progress)
            first = curve_of(results, within=within)
            ran = [point.values["sparsity"] for point in asked.points]
            prediction = None
            if first.recommended not in first.points and first.recommended > 0:
                prediction = predicted_at(first, first.recommended)
                more = _sweep(recipe, sorted([*map(float, ran), first.recommended]))
                results = run_sweep(more, pool, journal, journal.resume(), progress)
    finally:
        pool.close()
    assert results.dense is not None
    # the setting that was checked is the one to take, also where the new point moves the knee a little
    decisive = curve_of(results, within=within)
    curves = [replace(decisive, recommended=first.recommended, prediction=prediction)]
    lacking = []
    for name in quality_metrics(results.dense)[1:]:
        try:
            curves.append(curve_of(results, name, within))
        except UsageError as error:
            # the first one decides, and needs no other
            lacking.append(f"no curve of {name}: {error}")
    return results, curves, lacking


def _write(results: Results, curves: list[Any], out: Path) -> list[str]:
    """``curve.json`` and ``curve.html``, each whole or not at all; returns notes on what is missing."""
    from secateur.report.folder import write_study
    from secateur.sweep.curve import curve_document
    from secateur.sweep.curvepage import render_curve

    document = curve_document(curves, results)
    return write_study(out, "curve.json", document, "curve.html", lambda: render_curve(curves, results))


def _show(results: Results, curves: list[Any], out: Path, json: bool) -> None:
    if json:
        from secateur.sweep.curve import curve_document

        print_json({"output": str(out), **curve_document(curves, results)})
        return
    from secateur.report.tables import rows_table
    from secateur.sweep.curvepage import points_table, verdict

    name = next(r.name for r in results.points if r.done)
    show(
        rows_table(*points_table(curves, results)),
        verdict(curves[0], results),
        f"curve.html and the plan of every point, as {out / 'plans' / name}, are in {out}",
    )
