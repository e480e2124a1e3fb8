"""``secateur methods``."""

from __future__ import annotations

from typing import Annotated

import typer

from secateur.cli.options import Json, Plugins, load_plugins
from secateur.cli.output import print_json, show
from secateur.errors import UsageError, nearest


def methods(
    object: Annotated[
        str | None,
        typer.Option(
            "--object",
            metavar="KIND",
            # all of them, which only importing the methods would tell
            help="Only methods that cut weights, heads_and_neurons, hidden_states, layers, sublayers, vocabulary, "
            "channels or kv_cache.",
        ),
    ] = None,
    json: Json = False,
    plugin: Plugins = None,
) -> None:
    load_plugins(plugin)
    described = _described(object)
    if json:
        keys = ("name", "summary", "descriptor", "sequential")
        print_json([{key: method[key] for key in keys} for method in described])
        return
    from secateur.report.tables import methods_table

    show(methods_table(described))


def _described(kind: str | None) -> list[dict]:
    from secateur import methods
    from secateur.methods.descriptor import DESCRIPTOR_VALUES

    kinds = DESCRIPTOR_VALUES["object"]
    if kind is not None and kind not in kinds:
        raise UsageError(f"--object must be one of {', '.join(kinds)}, got '{kind}'{nearest(kind, kinds)}")
    names = methods.list_methods(**({"object": kind} if kind else {}))
    return [methods.describe(name) for name in names]
