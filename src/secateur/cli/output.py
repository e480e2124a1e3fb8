"""Results on stdout; progress and notes on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any

from secateur.report.numbers import json_ready

if TYPE_CHECKING:
    from rich.console import RenderableType

    from secateur.progress import Progress


@contextmanager
def working(quiet: bool) -> Iterator[Progress]:
    """Progress on stderr while work is done; what other libraries print to stdout goes to stderr as well."""
    from secateur.progress import Progress

    with redirect_stdout(sys.stderr), Progress(quiet=quiet) as progress:
        yield progress


def print_json(document: Any) -> None:
    """The one document of ``--json``."""
    print(json_text(document))


def json_text(document: Any) -> str:
    """JSON on several lines; NaN and infinities, which JSON lacks, become null."""
    return json.dumps(json_ready(document), indent=1, ensure_ascii=False)


def show(*parts: RenderableType, least: int = 0) -> None:
    """Print results for people, as wide as the terminal, and elsewhere 80 columns or ``least`` if that is more."""
    from rich.console import Console

    console = Console(file=sys.stdout, highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, least)
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, str), markup=False)


def show_notes(notes: Iterable[str], quiet: bool) -> None:
    """What the user should know, on stderr."""
    if not quiet:
        for note in dict.fromkeys(notes):
            print(f"note: {note}", file=sys.stderr)
