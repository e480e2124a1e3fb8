"""The command line: one file per command, each of which parses, calls ``secateur.api`` and prints."""

from __future__ import annotations

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point ``secateur``; ``arguments`` default to those of the process. Always raises SystemExit."""
    import sys

    from secateur.cli.running import run

    sys.exit(run(sys.argv[1:] if arguments is None else arguments))
