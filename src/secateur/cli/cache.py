"""``secateur cache compare | recommend``; ``fit`` has a file of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from secateur.cli.examples import help_text
from secateur.cli.options import Json, Plugins, Quiet, TrustRemoteCode, load_plugins
from secateur.cli.output import print_json, show, working

if TYPE_CHECKING:
    from secateur.cachestudy import Recommendation

app = typer.Typer(help="Compress the KV cache: what fits, and what it costs.", rich_markup_mode=None)

Question = Annotated[
    str,
    typer.Option(
        metavar="later|end",
        help="Whether the question is read behind the compressed cache (later), or is the end of what is compressed.",
    ),
]


@app.command("recommend", help=help_text("cache recommend"))
def recommend(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="As for 'prune'.")],
    context: Annotated[int, typer.Option(min=1, metavar="N", help="Tokens of the prompt.")] = 32768,
    memory: Annotated[str, typer.Option(metavar="SIZE", help="What the cache may take.")] = "2GiB",
    new: Annotated[int, typer.Option(min=0, metavar="N", help="Tokens that are written behind it.")] = 0,
    batch: Annotated[int, typer.Option(min=1, metavar="N", help="Sequences at a time.")] = 1,
    question: Question = "later",
    presses: Annotated[
        str | None,
        typer.Option(
            metavar="PRESS,...", help="What to choose from, without the fraction: snapkv,snapkv+mustafar:0.5."
        ),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    plugin: Plugins = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    load_plugins(plugin)
    from secateur.cachestudy import recommend_cache
    from secateur.methods.cachespec import split_presses
    from secateur.models.opening import open_source

    with working(quiet) as progress:
        # shapes are enough: no weight is read
        source, _ = open_source(model, trust_remote_code=trust_remote_code, progress=progress)
        source.close()
        found = recommend_cache(
            source.model,
            context=context,
            memory=memory,
            new=new,
            batch=batch,
            question=question,
            presses=split_presses(presses) if presses is not None else None,
        )
    if json:
        print_json(found.to_dict())
        return
    _show_recommendation(found)


def _show_recommendation(found: Recommendation) -> None:
    from secateur.report.numbers import format_bytes, percent
    from secateur.report.tables import rows_table

    parts = []
    if found.candidates:
        rows = [
            [
                one.spec,
                format_bytes(one.bytes_held),
                percent(one.bytes_held / found.bytes_dense),
                format_bytes(one.bytes_peak),
                "take this" if one.spec == found.spec else "",
            ]
            for one in found.candidates
        ]
        parts.append(rows_table(["cache", "held", "of dense", "at most", ""], rows))
    left = f"{', '.join(found.missing)} can't get that small" if found.missing else ""
    show(*parts, found.sentence, *([left] if left else []))
