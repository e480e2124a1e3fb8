"""The command line: one file per command, each of which parses, calls ``secateur.api`` and prints."""

from __future__ import annotations

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point ``secateur``; ``arguments`` default to those of the process. Always raises SystemExit."""
    import gc
    import sys

    if arguments is None:
        # the process is ours: among what the libraries make when they are imported there is no garbage, and to look
        # for it every 700 objects, as Python 3.11 does, takes an eighth of the start
        gc.set_threshold(5000)
    from secateur.cli.running import run

    sys.exit(run(sys.argv[1:] if arguments is None else arguments))
