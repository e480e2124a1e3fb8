"""``secateur stability``."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secateur.cli.options import Json, Overwrite, Quiet, Seed, check_resume
from secateur.cli.output import json_text, print_json, show, show_notes, working
from secateur.errors import UsageError

if TYPE_CHECKING:
    from secateur.rounds import Stability

RESULTS, PAGE = "results.json", "stability.html"


def stability(
    network: Annotated[
        str, typer.Argument(metavar="FILE:NAME", help="Python function that makes the network, as net.py:network.")
    ],
    train: Annotated[
        str, typer.Option("--train", metavar="FILE:NAME", help="Function train(network, run), as secateur.lottery's.")
    ],
    evaluate: Annotated[
        str, typer.Option("--evaluate", metavar="FILE:NAME", help="Function that gives numbers by name of a network.")
    ],
    at: Annotated[str, typer.Option(metavar="STEP,STEP,...", help="Steps at which the two copies part.")] = "0",
    length: Annotated[
        int, typer.Option(min=0, metavar="N", help="Steps of a whole training, to check that copies begin at theirs.")
    ] = 0,
    masks: Annotated[Path | None, typer.Option(metavar="PLAN", help="Plan whose masks hold in both copies.")] = None,
    points: Annotated[int, typer.Option(min=2, metavar="N", help="Points on the line, its ends included.")] = 30,
    statistics: Annotated[
        str,
        typer.Option(
            metavar="recompute|interpolate", help="Statistics of batch norms: taken again at every point, or between."
        ),
    ] = "recompute",
    data: Annotated[
        str | None,
        typer.Option(metavar="FILE:NAME", help="Function that gives the batches on which statistics are taken again."),
    ] = None,
    metric: Annotated[
        str | None, typer.Option(metavar="NAME", help="The number that decides (default accuracy, or else the first).")
    ] = None,
    within: Annotated[
        float, typer.Option(metavar="X", help="A barrier below which training counts as stable, in its unit.")
    ] = 2.0,
    seed: Seed = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Folder for numbers and curves.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the steps in the folder.")] = False,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    check_resume(resume, overwrite)
    steps = parse_steps(at)
    from secateur.plans import Plan
    from secateur.rounds import instability
    from secateur.rounds.stabilitypage import columns, document, verdict
    from secateur.usercode import call_object, load_object

    made, trained, evaluated = (_function(name) for name in (network, train, evaluate))
    with working(quiet) as progress:
        found = instability(
            made,
            trained,
            evaluated,
            at=steps,
            length=length,
            masks=Plan.load(masks) if masks is not None else None,
            points=points,
            statistics=statistics,
            data=call_object(data, load_object(data)) if data is not None else None,
            seed=seed or 0,
            folder=out,
            resume=resume,
            overwrite=overwrite,
            progress=progress,
        )
    decides = _metric(found, metric)
    told = document(found, decides, within)
    if out is not None:
        show_notes(_write(found, decides, within, out, network), quiet)
    if json:
        print_json({"output": str(out) if out is not None else None, **told})
        return
    from secateur.report.tables import rows_table

    places = [f"{RESULTS} and {PAGE} are in {out}"] if out is not None else []
    show(rows_table(*columns(found, decides, within)), verdict(found, decides, within), *places)


def parse_steps(text: str) -> list[int]:
    """``0,20,100`` → these. Raises UsageError."""
    try:
        return [int(step) for step in text.split(",")]
    except ValueError:
        raise UsageError(f"--at takes steps such as 0,20,100, got '{text}'") from None


def _function(reference: str) -> Callable[..., Any]:
    """The user's function, whose failures are one sentence with the place. Raises UsageError."""
    from secateur.usercode import call_object, load_object

    function = load_object(reference)
    if not callable(function):
        raise UsageError(f"{reference} is no function")
    return lambda *arguments: call_object(reference, function, *arguments)


def _metric(found: Stability, wanted: str | None) -> str:
    known = list(found.found[0].curves)
    if wanted is not None and wanted not in known:
        raise UsageError(f"--metric must be one that the evaluation gives: {', '.join(known)}; got '{wanted}'")
    return wanted or ("accuracy" if "accuracy" in known else known[0])


def _write(found: Stability, metric: str, within: float, out: Path, name: str) -> list[str]:
    """Numbers and page, each whole or not at all; returns notes on what is missing."""
    from secateur.files import write_text
    from secateur.rounds.stabilitypage import document, render

    write_text(out / RESULTS, json_text(document(found, metric, within)) + "\n")
    if importlib.util.find_spec("plotly") is None:
        return [f"{PAGE} needs plotly, which is not installed: pip install 'secateur[report]'"]
    write_text(out / PAGE, render(found, metric, within, name))
    return []
