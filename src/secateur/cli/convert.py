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
    out: Annotated[str, typer.Option("--out", metavar="DIR|FILE", help="Folder, or with --to gguf file, to write.")],
    to: Annotated[
        str,
        typer.Option(
            metavar="safetensors|gguf|deci|onnx",
            help="For transformers, for llama.cpp, for vLLM and SGLang, or for onnxruntime.",
        ),
    ] = "safetensors",
    format: Annotated[str, typer.Option(metavar="dense|packed", help="How zeros are stored in safetensors.")] = "dense",
    dtype: Annotated[
        str, typer.Option(metavar="NAME", help="Of matrices in GGUF: auto, float32, float16, bfloat16 or q8_0.")
    ] = "auto",
    max_shard_size: Annotated[
        str, typer.Option("--max-shard-size", metavar="SIZE", help="Size of a safetensors file, as in 5GB or 200MB.")
    ] = "5GB",
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    from secateur import api

    with working(quiet):
        written = api.convert(
            model,
            out,
            to=to,
            format=format,
            dtype=dtype,
            max_shard_size=max_shard_size,
            trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
            overwrite=overwrite,
        )
    if json:
        path = Path(written)
        files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.suffix in _WEIGHTS)
        size = sum(file.stat().st_size for file in files)
        names = [file.name for file in files]
        print_json({"output": str(written), "to": to, "format": format, "files": names, "bytes": size})
        return
    show(how_to_load(str(written)) if to == "safetensors" else _how_to_run(to, str(written)))


# names of files that hold weights
_WEIGHTS = (".safetensors", ".onnx", ".data")


def _how_to_run(to: str, out: str) -> str:
    from secateur.runtimes import TARGETS

    return f"saved to {out}; {TARGETS[to].advice.format(out=out)}"
