"""``secateur convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli.options import AllowPickle, Json, Overwrite, Quiet, TrustRemoteCode
from secateur.cli.output import print_json, show, working
from secateur.cli.saving import how_to_load


def convert(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, folder, .gguf file or built-in name.")],
    out: Annotated[Path, typer.Argument(metavar="DIR", help="Folder for the checkpoint.")],
    format: Annotated[str, typer.Option(metavar="dense|packed", help="How zeros are stored.")] = "dense",
    max_shard_size: Annotated[
        str, typer.Option("--max-shard-size", metavar="SIZE", help="Size of a weight file, as in 5GB or 200MB.")
    ] = "5GB",
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    from secateur import api

    with working(quiet):
        api.convert(
            model,
            out,
            format=format,
            max_shard_size=max_shard_size,
            trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
            overwrite=overwrite,
        )
    if json:
        files = sorted(path.name for path in out.glob("*.safetensors"))
        size = sum((out / file).stat().st_size for file in files)
        print_json({"output": str(out), "format": format, "files": files, "bytes": size})
        return
    show(how_to_load(str(out)))
