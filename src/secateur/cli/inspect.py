"""``secateur inspect``."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secateur.cli.options import AllowPickle, Json, Quiet, Revision, TrustRemoteCode
from secateur.cli.output import print_json, show, working
from secateur.errors import UsageError

if TYPE_CHECKING:
    from secateur.structure import Anatomy


def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, folder, .gguf file or built-in name.")],
    heads: Annotated[
        str,
        typer.Option("--heads", metavar="kv|query", help="Cut key-value heads with their queries, or query heads."),
    ] = "kv",
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: AllowPickle = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    if heads not in ("kv", "query"):
        raise UsageError(f"--heads must be kv or query, got '{heads}'")
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
        anatomy = api.anatomy(source.model, heads=heads)
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
        "frozen": [dataclasses.asdict(item) for item in anatomy.frozen],
    }
