"""``secateur inspect``."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secateur.cli.network import NETWORK, inspect_network
from secateur.cli.options import AllowPickle, Ignore, Inputs, Json, Quiet, Revision, TrustRemoteCode, only_for
from secateur.cli.output import print_json, show, working
from secateur.errors import UsageError
from secateur.networks.kinds import is_named_network

if TYPE_CHECKING:
    from secateur.structure import Anatomy


def inspect(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Hub id, folder, .gguf file or built-in name; or .onnx file, package.module:function.",
        ),
    ],
    heads: Annotated[
        str | None,
        typer.Option(
            "--heads",
            metavar="kv|query|outer|inner|both",
            help="Cut key-value heads with their queries (default) or query heads; of a traced network whole heads "
            "(outer, the default), the same lane of every head (inner), or both.",
            show_default=False,
        ),
    ] = None,
    input: Inputs = None,
    ignore: Ignore = None,
    why: Annotated[
        str | None,
        typer.Option(
            "--why", metavar="NAME", help="Say of a module or parameter of a traced network what its cuts take along."
        ),
    ] = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    if is_named_network(model):
        only_for(NETWORK, context, {"model", "heads", "input", "ignore", "why", "json", "quiet"}, "language models")
        inspect_network(
            model, inputs=input or [], heads=heads or "outer", ignore=ignore or [], why=why, json=json, quiet=quiet
        )
        return
    everything = {str(parameter.name) for parameter in context.command.params}
    only_for("a language model", context, everything - {"input", "ignore", "why"}, "traced networks")
    if heads not in (None, "kv", "query"):
        raise UsageError(f"--heads of a language model must be kv or query, got '{heads}'")
    from secateur import api
    from secateur.models.opening import open_source

    with working(quiet) as progress:
        # shapes are enough: no weight is read
        source, _ = open_source(
            model,
            revision=revision,
            trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
            progress=progress,
        )
        source.close()
        anatomy = api.anatomy(source.model, heads=heads or "kv")
    if json:
        commit = getattr(source.model, "secateur_revision", "")
        print_json({"model": model, **({"revision": commit} if commit else {}), **anatomy_document(anatomy)})
        return
    from secateur.report.tables import anatomy_text

    show(anatomy_text(anatomy))


def anatomy_document(anatomy: Anatomy) -> dict[str, Any]:
    """The anatomy as JSON-ready values; costs of a group are those of one unit."""
    keys = ("name", "kind", "layer", "units", "reader", "frozen", "inexact")
    return {
        "model_type": anatomy.model_type,
        "num_layers": anatomy.num_layers,
        "total": dataclasses.asdict(anatomy.total),
        "blocks": dataclasses.asdict(anatomy.blocks),
        "groups": [
            {**{key: getattr(group, key) for key in keys}, "cost": dataclasses.asdict(group.cost)} for group in anatomy
        ],
        "matrices": [{"module": m.module, "layer": m.layer, "shape": list(m.shape)} for m in anatomy.matrices],
        **_coverage_document(anatomy),
        "frozen": [dataclasses.asdict(item) for item in anatomy.frozen],
    }


def _coverage_document(anatomy: Anatomy) -> dict[str, Any]:
    """What of the blocks lies in no matrix; nothing where all does."""
    coverage = anatomy.coverage
    return {"coverage": {**coverage.model_dump(mode="json"), "share": coverage.share}} if coverage is not None else {}
