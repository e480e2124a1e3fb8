"""``secateur cache fit``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from secateur.cli.options import Device, Json, Overwrite, Quiet, Resume, TrustRemoteCode
from secateur.cli.output import print_json, show, working
from secateur.files import check_output

if TYPE_CHECKING:
    from secateur.cache.fitting import Fit


def fit(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="As for 'prune'.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the surrogate.")],
    data: Annotated[
        str, typer.Option("--data", metavar="NAME|FILE|DATASET", help="Text that is like what will be read.")
    ] = "builtin",
    samples: Annotated[int, typer.Option("--samples", min=2, metavar="N", help="Texts; some are held out.")] = 32,
    length: Annotated[int, typer.Option("--length", min=2, metavar="N", help="Tokens of a text.")] = 1024,
    rows: Annotated[int, typer.Option("--rows", min=1, metavar="N", help="Tokens that are drawn of a text.")] = 500,
    kind: Annotated[str, typer.Option("--kind", metavar="linear|mlp", help="What the surrogate is.")] = "linear",
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Seed of what is drawn.")] = 0,
    dtype: Annotated[str, typer.Option("--dtype", metavar="NAME", help="Dtype of the weights.")] = "auto",
    device: Device = "cpu",
    resume: Resume = False,
    overwrite: Overwrite = False,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    check_output(out, overwrite)
    with working(quiet) as progress:
        from secateur import api
        from secateur.cache.fitting import FitOptions, fit_surrogate
        from secateur.observe.calibration import load_tokens

        options = FitOptions(kind=kind, rows=rows, seed=seed)
        loaded, tokenizer = api.load(
            model, dtype=dtype, device=device, trust_remote_code=trust_remote_code, progress=progress
        )
        tokens = load_tokens(data, tokenizer, samples=samples, length=length, seed=seed, model=loaded)
        # what stands before a text is put there by the fit
        windows = tokens.ids[:, 1:] if tokens.bos else tokens.ids
        found = fit_surrogate(
            loaded, tokenizer, windows, out, options, resume=resume, overwrite=overwrite, progress=progress
        )
    if json:
        print_json(found.document())
    else:
        show(*_lines(found))


def _lines(found: Fit) -> list[str]:
    layers = [sum(row) / len(row) for row in found.r2]
    lines = [
        f"R\N{SUPERSCRIPT TWO} of log scores on {found.held_out} held-out of {found.texts + found.held_out} texts:"
        f" {found.mean_r2:.2f} ({min(layers):.2f} to {max(layers):.2f} by layer)",
        "tokens of these texts below a threshold:",
    ]
    lines += [f"  {share:4.0%}  threshold={value:.2f}" for share, value in found.thresholds.items()]
    return [*lines, f"written to {found.folder}: kvzap:surrogate={found.folder},threshold=..."]
