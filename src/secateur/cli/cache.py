"""``secateur cache``; its commands have files of their own."""

from __future__ import annotations

import typer

app = typer.Typer(help="Compress the KV cache: what fits, and what it costs.", rich_markup_mode=None)
