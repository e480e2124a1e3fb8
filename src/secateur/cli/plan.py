"""``secateur plan show | diff | merge | apply``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secateur.cli.examples import help_text
from secateur.cli.network import NETWORK, apply_to_network
from secateur.cli.options import (
    AllowPickle,
    Device,
    Json,
    MaxShardSize,
    Overwrite,
    Quiet,
    Resume,
    Revision,
    TrustRemoteCode,
    only_for,
)
from secateur.cli.output import print_json, show, show_notes, working
from secateur.cli.saving import how_to_load
from secateur.errors import UsageError
from secateur.files import check_output
from secateur.networks.kinds import is_named_network
from secateur.runs.finished import check_run_output

if TYPE_CHECKING:
    from secateur.plans import Plan

app = typer.Typer(help="Show, compare, join and apply plans.", rich_markup_mode=None)

PlanFolder = Annotated[str, typer.Argument(metavar="PLAN", help="A plan folder, or a checkpoint that holds its plan.")]


@app.command("show", help=help_text("plan show"))
def show_plan(plan: PlanFolder, json: Json = False) -> None:
    plans = load_plans(plan)
    if json:
        print_json({"plans": [plan_document(p) for p in plans.values()]})
        return
    show_plans(list(plans.values()))


@app.command("diff", help=help_text("plan diff"))
def diff(first: PlanFolder, second: PlanFolder, json: Json = False) -> None:
    difference = load_plan(first).diff(load_plan(second))
    if json:
        keys = ("both", "only_first", "only_second")
        print_json({name: dict(zip(keys, row, strict=True)) for name, row in difference.rows.items()})
        return
    from secateur.report.tables import diff_table

    show(diff_table(difference))


@app.command("merge", help=help_text("plan merge"))
def merge(
    first: PlanFolder,
    second: PlanFolder,
    out: Annotated[str, typer.Option("--out", metavar="DIR|URL", help="Folder for the joined plan.")],
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    check_output(out, overwrite)
    merged = load_plan(first).merge(load_plan(second))
    merged.save(out, overwrite=overwrite)
    if json:
        print_json({"output": str(out), "plans": [plan_document(merged)]})
        return
    show(f"{merged.method} written to {out}")


@app.command("apply", help=help_text("plan apply"))
def apply(
    context: typer.Context,
    plan: PlanFolder,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The model that the plan was made for.")],
    out: Annotated[
        str,
        typer.Option(
            "--out", metavar="DIR|URL|FILE", help="Folder for the checkpoint; of a traced network also .onnx or .pt2."
        ),
    ],
    format: Annotated[str, typer.Option(metavar="dense|packed", help="How zeros are stored.")] = "dense",
    device: Device = "cpu",
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    max_shard_size: MaxShardSize = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    if is_named_network(model):
        only_for(NETWORK, context, {"plan", "model", "out", "overwrite", "json", "quiet"}, "language models")
        apply_to_network(list(load_plans(plan).values()), model, out, overwrite=overwrite, json=json, quiet=quiet)
        return
    if format not in ("dense", "packed"):
        raise UsageError(f"--format must be dense or packed, got '{format}'")
    check_run_output(out, resume=resume, overwrite=overwrite)
    plans = list(load_plans(plan).values())
    from secateur.runs.applying import apply_plans

    with working(quiet) as progress:
        warned = apply_plans(
            plans,
            model,
            out,
            format=format,
            max_shard_size=max_shard_size or "5GB",
            device=device,
            resume=resume,
            overwrite=overwrite,
            revision=revision,
            trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
            progress=progress,
        )
    notes = [f"{p.method} {p.coverage.sentence}" for step in plans for p in step.provenance if p.coverage is not None]
    notes += [note for step in plans for p in step.provenance for note in p.notes]
    trained = [recovery.label for step in plans for p in step.provenance for recovery in p.recoveries]
    notes += [f"the model was trained after the cut ({label}), and this is the one before" for label in trained]
    show_notes([*warned, *notes], quiet)
    if json:
        print_json({"output": str(out), "plans": [plan_document(step) for step in plans]})
        return
    show(how_to_load(out))


def load_plans(folder: str | Path) -> dict[Path, Plan]:
    """The plans of all steps by folder. Raises PlanError."""
    from secateur.plans import Plan, find_plans

    return {path: Plan.load(path) for path in find_plans(folder)}


def load_plan(folder: str) -> Plan:
    """A single plan. Raises UsageError when there are several steps to choose from, PlanError when there is none."""
    plans = load_plans(folder)
    if len(plans) > 1:
        raise UsageError(f"{folder} holds the plans of {len(plans)} steps; name one of them, as in {next(iter(plans))}")
    return next(iter(plans.values()))


def show_plans(plans: list[Plan]) -> None:
    """Print the table of every plan, under the number of its step when there are several."""
    from secateur.report.tables import plan_table

    for number, plan in enumerate(plans, start=1):
        show(*([f"step {number}"] if len(plans) > 1 else []), plan_table(plan))


def plan_document(plan: Plan) -> dict[str, Any]:
    """A plan as JSON-ready values: units kept and removed per group, sparsity per weight, provenance."""
    return {
        "method": plan.method,
        "provenance": [p.model_dump(mode="json") for p in plan.provenance],
        "groups": {
            name: {"units": units, "kept": len(plan.keep[name]), "removed": plan.removed(name).tolist()}
            for name, units in plan.groups.items()
        },
        "masks": {
            name: {"shape": list(mask.shape), "sparsity": plan.sparsity(name)} for name, mask in plan.masks.items()
        },
        "values": sorted(plan.values),
        "biases": sorted(plan.biases),
    }
