"""``secateur describe``."""

from __future__ import annotations

from typing import Annotated

import typer

from secateur.cli.options import Json, Plugins, load_plugins
from secateur.cli.output import print_json, show


def describe(
    method: Annotated[str, typer.Argument(metavar="METHOD", help="A name that 'secateur methods' lists.")],
    json: Json = False,
    plugin: Plugins = None,
) -> None:
    from secateur import methods

    load_plugins(plugin)
    described = methods.describe(method)
    if json:
        print_json(described)
        return
    from secateur.report.tables import method_text

    show(method_text(described))
