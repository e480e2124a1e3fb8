"""``secateur latency-table``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secateur.cli.options import AllowPickle, Device, Json, Overwrite, Quiet, Revision, TrustRemoteCode
from secateur.cli.output import print_json, show, working
from secateur.errors import UsageError
from secateur.files import check_output_file
from secateur.networks.kinds import is_named_network
from secateur.timing import Workload

if TYPE_CHECKING:
    from secateur.models.latency import DecoderLatency


def latency_table(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, folder, .gguf file or built-in name.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="CSV or JSON file for the table (default: the user's cache)."),
    ] = None,
    workload: Annotated[str, typer.Option("--workload", metavar="KEY=N,...", help="The request that is timed.")] = str(
        Workload()
    ),
    heads: Annotated[
        str, typer.Option("--heads", metavar="kv|query", help="What leaves of attention, as for 'prune --set heads'.")
    ] = "kv",
    dtype: Annotated[
        str, typer.Option("--dtype", metavar="NAME", help="Dtype of the weights; auto is the checkpoint's own.")
    ] = "auto",
    device: Device = "cpu",
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    if is_named_network(model):
        raise UsageError("latency-table is for language models; 'prune --latency-table' keeps the times of others")
    if heads not in ("kv", "query"):
        raise UsageError(f"--heads must be kv or query, got '{heads}'")
    asked = Workload.parse(workload)
    if out is not None:
        check_output_file(out, overwrite)
    with working(quiet) as progress:
        from secateur import api
        from secateur.latencytable import LatencyTable
        from secateur.models.decoders import decoder_anatomy
        from secateur.models.latency import measure_decoder
        from secateur.models.sources import Source

        loaded, _ = api.load(
            model,
            revision=revision,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
            progress=progress,
        )
        table = LatencyTable.cached() if out is None else LatencyTable(out)
        found = measure_decoder(Source(loaded), decoder_anatomy(loaded, heads=heads), asked, table, progress)
    if json:
        print_json(_document(found))
    else:
        show(*_lines(found), f"table in {found.table.path}")


def _document(found: DecoderLatency) -> dict[str, Any]:
    return {
        "table": str(found.table.path),
        "about": found.about,
        "dense_ms": found.dense,
        "block_ms": {kind: dict(zip(kept, times, strict=True)) for kind, (kept, times) in found.curves().items()},
    }


def _lines(found: DecoderLatency) -> list[str]:
    lines = [f"{found.dense:.1f} ms a request: {found.about}", "milliseconds of a block, by what it keeps:"]
    for kind, (kept, times) in found.curves().items():
        lines += [f"  {units:6d} x {kind}: {time:.3f}" for units, time in zip(kept, times, strict=True)]
    return lines
