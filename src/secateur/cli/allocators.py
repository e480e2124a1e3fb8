"""``secateur allocators``."""

from __future__ import annotations

from typing import Annotated

import typer

from secateur.cli.options import Json
from secateur.cli.output import print_json, show


def allocators(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Explain this one: equations, source, options.")
    ] = None,
    json: Json = False,
) -> None:
    from secateur.allocators import describe_allocator, list_allocators

    if name is not None:
        described = describe_allocator(name)
        if json:
            print_json(described)
            return
        from secateur.report.tables import allocator_text

        show(allocator_text(described))
        return
    every = [describe_allocator(one) for one in list_allocators()]
    if json:
        print_json([{key: one[key] for key in ("name", "summary", "observes", "follows")} for one in every])
        return
    from secateur.report.tables import allocators_table

    show(allocators_table(every))
