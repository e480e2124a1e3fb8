"""``secateur sweep``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from secateur.cli.options import (
    DEFAULT_WORKERS,
    Address,
    ExpectedFirst,
    Json,
    Overwrite,
    Plugins,
    Quiet,
    Resume,
    TrustRemoteCode,
    Workers,
    absolute,
    check_resume,
    load_plugins,
)
from secateur.cli.output import print_json, show, show_notes, working
from secateur.errors import SweepError, UsageError, require_extra

if TYPE_CHECKING:
    from secateur.sweep.runner import Results
    from secateur.sweep.spec import Sweep


def sweep(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML recipe with the key 'sweep'.")],
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Folder for results and plans.")] = None,
    address: Address = None,
    workers: Workers = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    estimate: ExpectedFirst = True,
    trust_remote_code: TrustRemoteCode = False,
    plugin: Plugins = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    check_resume(resume, overwrite)
    load_plugins(plugin)
    from secateur.cli.estimate import announce_points
    from secateur.sweep.expected import announce_rest
    from secateur.sweep.pools import open_pool
    from secateur.sweep.runner import make_job, open_journal, resumable, run_sweep
    from secateur.sweep.spec import load_sweep

    asked = load_sweep(recipe, trust_remote_code=trust_remote_code)
    folder = out or (Path(asked.base.out) if asked.base.out else None)
    if folder is None:
        raise UsageError("give a folder for the results with --out")
    _check(asked)
    job = make_job(asked, folder, trust_remote_code=trust_remote_code, plugins=absolute(plugin or []))
    journal, finished = open_journal(folder, job, resume=resume, overwrite=overwrite)
    with working(quiet) as progress, resumable(journal, asked):
        pool, notes = open_pool(job, workers, address, min(DEFAULT_WORKERS, asked.size), what="points")
        try:
            announce_rest(asked, finished, pool, announce_points(quiet, estimate))
            results = run_sweep(asked, pool, journal, finished, progress)
        finally:
            pool.close()
    from secateur.sweep.results import write_results

    results.notes[:0] = notes
    missing = write_results(results, folder)
    show_notes([*results.notes, *missing], quiet)
    _show(results, folder, json)
    fail(results)


def _check(asked: Sweep) -> None:
    """Refuse what can't work before anything is written."""
    from secateur.evaluation import make_task

    for task in asked.base.evaluate:
        make_task(task)
    if asked.search is not None:
        require_extra("optuna", "sweep", "a search")


def _show(results: Results, folder: Path, json: bool) -> None:
    from secateur.sweep.results import results_document, results_table

    if json:
        print_json({"output": str(folder), **results_document(results)})
        return
    show(results_table(results), f"results, plans and sweep.html are in {folder}")


def fail(results: Results) -> None:
    """Say after everything else what is missing. Raises SweepError."""
    failed = results.failed
    if failed:
        raise SweepError(
            f"{len(failed)} of {results.sweep.size} points failed, the first of them {failed[0].name}: "
            f"{failed[0].error.rstrip('.')}; --resume tries them again"
        )
