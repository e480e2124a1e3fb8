"""``secateur train``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secateur.cli.options import (
    ComputeDevice,
    Json,
    Overwrite,
    Plugins,
    Quiet,
    Resume,
    Seed,
    TrustRemoteCode,
    check_resume,
    load_plugins,
)
from secateur.cli.output import print_json, show, show_notes, working
from secateur.cli.prune import given
from secateur.cli.saving import drawn, how_to_load
from secateur.files import check_output
from secateur.ranks import join

if TYPE_CHECKING:
    from secateur.trainer import TrainedRun


def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML recipe of a training.")],
    out: Annotated[
        str | None, typer.Option("--out", metavar="DIR", help="Folder for the trained network (default: the recipe's).")
    ] = None,
    seed: Seed = None,
    device: ComputeDevice = None,
    report: Annotated[
        bool | None, typer.Option("--report/--no-report", help="Write report.html beside the weights (default).")
    ] = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    plugin: Plugins = None,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    check_resume(resume, overwrite)
    load_plugins(plugin)
    from secateur.trainer import load_train_recipe, run_training

    told = given({"seed": seed, "device": device, "out": out})
    asked = load_train_recipe(recipe, trust_remote_code=trust_remote_code, **told)
    if asked.out is not None:
        check_output(asked.out, overwrite)
    html = drawn(report)
    ranks = join()
    with ranks.together(), working(quiet or not ranks.main) as progress:
        done = run_training(
            asked,
            html=html,
            resume=resume,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    if ranks.main:
        show_notes(done.report.notes, quiet)
        _show(done, str(asked.out), json, language=asked.data.text is not None)


def _show(done: TrainedRun, out: str, json: bool, *, language: bool) -> None:
    if json:
        document: dict[str, Any] = {**done.report.to_dict(), "output": out}
        print_json(document)
        return
    from secateur.report.tables import metrics_table
    from secateur.report.training import summary

    saved = how_to_load(out) if language else f"saved to {out}; {out}/README.md says how to load it"
    show(metrics_table(done.report.metrics), summary(done.report.trainings[0]), saved)
