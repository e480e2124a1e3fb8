"""``secateur stability``."""

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
from secateur.errors import UsageError

if TYPE_CHECKING:
    from secateur.rounds import Stability
    from secateur.rounds.stabilitypage import Limit

RESULTS, PAGE = "results.json", "stability.html"


def stability(
    network: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE|FILE:NAME",
            help="YAML recipe of a training, or the Python function that makes the network, as net.py:network.",
        ),
    ],
    train: Annotated[
        str | None,
        typer.Option("--train", metavar="FILE:NAME", help="Function train(network, run), as secateur.lottery's."),
    ] = None,
    evaluate: Annotated[
        str | None,
        typer.Option("--evaluate", metavar="FILE:NAME", help="Function that gives numbers by name of a network."),
    ] = None,
    at: Annotated[
        str | None,
        typer.Option(
            metavar="STEP,STEP,...", help="Steps at which the two copies part, or parts of the training: 0,20,3%."
        ),
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(min=0, metavar="N", help="Steps of a whole training, to check that copies begin at theirs."),
    ] = None,
    masks: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Plan, or level of a lottery, whose masks hold in both copies."),
    ] = None,
    points: Annotated[
        int | None, typer.Option(min=2, metavar="N", help="Points on the line, its ends included (default 30).")
    ] = None,
    statistics: Annotated[
        str | None,
        typer.Option(
            metavar="recompute|interpolate", help="Statistics of batch norms: taken again at every point, or between."
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="FILE:NAME", help="Function that gives the batches on which statistics are taken again."),
    ] = None,
    metric: Annotated[
        str | None, typer.Option(metavar="NAME", help="The number that decides (default accuracy, or else the first).")
    ] = None,
    within: Annotated[
        float | None,
        typer.Option(
            metavar="X", help="A barrier below which training counts as stable, in its unit (default 2 points)."
        ),
    ] = None,
    seed: Seed = None,
    device: ComputeDevice = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Folder for numbers and curves.")] = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    plugin: Plugins = None,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    check_resume(resume, overwrite)
    load_plugins(plugin)
    own = {"train": train, "evaluate": evaluate, "length": length, "data": data}
    how: dict[str, Any] = {"points": points, "statistics": statistics}
    again = {"resume": resume, "overwrite": overwrite}
    if network.lower().endswith((".yaml", ".yml")):
        _refuse(own, "is for functions: the recipe says it")
        from secateur.trainer.stability import load_stability_recipe, run_stability

        changed = {**how, "at": at.split(",") if at else None, "masks": str(masks) if masks else None}
        changed |= {"metric": metric, "within": within}
        asked = load_stability_recipe(
            network,
            given(changed),
            trust_remote_code=trust_remote_code,
            **given({"seed": seed, "device": device, "out": str(out) if out else None}),
        )
        out, name, limit = Path(asked.out) if asked.out else None, asked.model.name, asked.limit
        with working(quiet) as progress:
            found = run_stability(asked, out, **again, trust_remote_code=trust_remote_code, progress=progress)
    else:
        if train is None or evaluate is None:
            raise UsageError(
                f"{network} is no recipe (.yaml), and a function that makes a network needs --train and --evaluate"
            )
        _refuse({"device": device, "trust-remote-code": trust_remote_code or None}, "is for recipes: functions say it")
        name = network
        found = _of_functions(
            network, train, evaluate, at, length or 0, masks, data, seed or 0, out, quiet, **how, **again
        )
        limit = _limit(found, metric, within)
    _show(found, limit, out, name, json, quiet)


def _of_functions(
    network: str,
    train: str,
    evaluate: str,
    at: str | None,
    length: int,
    masks: Path | None,
    data: str | None,
    seed: int,
    out: Path | None,
    quiet: bool,
    **how: Any,
) -> Stability:
    steps = parse_steps(at or "0", length)
    from secateur.networks.naming import load_batches
    from secateur.rounds import instability
    from secateur.usercode import load_function

    made, trained, evaluated = (load_function(name) for name in (network, train, evaluate))
    with working(quiet) as progress:
        return instability(
            made,
            trained,
            evaluated,
            at=steps,
            length=length,
            masks=masks,
            data=load_batches(data) if data is not None else None,
            seed=seed,
            folder=out,
            progress=progress,
            **given(how),
        )


def parse_steps(text: str, length: int = 0) -> list[int]:
    """``0,20,3%`` → these, of a training of so many steps. Raises OptionError."""
    from secateur.methods.rounds import checked_step

    return [checked_step("--at", step, length, "--length") for step in text.split(",")]


def _refuse(options: dict[str, Any], why: str) -> None:
    for name in given(options):
        raise UsageError(f"--{name} {why}")


def _limit(found: Stability, wanted: str | None, within: float | None) -> Limit:
    """What decides of the numbers that the user's function gave."""
    from secateur.rounds.stability import STABLE
    from secateur.rounds.stabilitypage import Limit

    known = list(found.found[0].curves)
    if wanted is not None and wanted not in known:
        raise UsageError(f"--metric must be one that the evaluation gives: {', '.join(known)}; got '{wanted}'")
    metric = wanted or ("accuracy" if "accuracy" in known else known[0])
    return Limit(metric, STABLE if within is None else within)


def _show(found: Stability, limit: Limit, out: Path | None, name: str, json: bool, quiet: bool) -> None:
    from secateur.rounds.stabilitypage import columns, document, verdict

    if out is not None:
        show_notes(_write(found, limit, out, name), quiet)
    if json:
        print_json({"output": str(out) if out is not None else None, **document(found, limit)})
        return
    from secateur.report.tables import rows_table

    places = [f"{RESULTS} and {PAGE} are in {out}"] if out is not None else []
    show(rows_table(*columns(found, limit)), verdict(found, limit), *places)


def _write(found: Stability, limit: Limit, out: Path, name: str) -> list[str]:
    """Numbers and page, each whole or not at all; returns notes on what is missing."""
    from secateur.report.folder import write_study
    from secateur.rounds.stabilitypage import document, render

    return write_study(out, RESULTS, document(found, limit), PAGE, lambda: render(found, limit, name))
