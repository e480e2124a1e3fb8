"""The commands put together."""

from __future__ import annotations

from typing import Annotated

import typer

from secateur.cli import (
    allocators,
    cache,
    cache_fit,
    compare,
    convert,
    curve,
    describe,
    estimate,
    evaluate,
    heal,
    inspect,
    latency_table,
    lottery,
    methods,
    plan,
    prune,
    stability,
    sweep,
    train,
    verify,
)
from secateur.cli.examples import help_text
from secateur.cli.options import Plugins, load_plugins

app = typer.Typer(
    name="secateur",
    help="Prune language models and any other network: cut, measure, save, and load the result anywhere.",
    add_completion=False,
    rich_markup_mode=None,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from secateur import __version__

        typer.echo(f"secateur {__version__}")
        raise typer.Exit


@app.callback()
def options(
    plugin: Plugins = None,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    load_plugins(plugin)


app.command("prune", help=help_text("prune"))(prune.prune)
app.command("estimate", help=help_text("estimate"))(estimate.estimate)
app.command("heal", help=help_text("heal"))(heal.heal)
app.command("train", help=help_text("train"))(train.train)
app.command("lottery", help=help_text("lottery"))(lottery.lottery)
app.add_typer(plan.app, name="plan")
app.command("evaluate", help=help_text("evaluate"))(evaluate.evaluate)
app.command("sweep", help=help_text("sweep"))(sweep.sweep)
app.command("curve", help=help_text("curve"))(curve.curve)
app.command("stability", help=help_text("stability"))(stability.stability)
app.command("compare", help=help_text("compare"))(compare.compare)
app.add_typer(cache.app, name="cache")
app.command("verify", help=help_text("verify"))(verify.verify)
app.command("convert", help=help_text("convert"))(convert.convert)
app.command("inspect", help=help_text("inspect"))(inspect.inspect)
app.command("latency-table", help=help_text("latency-table"))(latency_table.latency_table)
app.command("methods", help=help_text("methods"))(methods.methods)
app.command("allocators", help=help_text("allocators"))(allocators.allocators)
app.add_typer(cache.app, name="cache")
cache.app.command("fit", help=help_text("cache fit"))(cache_fit.fit)
app.command("describe", help=help_text("describe"))(describe.describe)
