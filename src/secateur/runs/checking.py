"""Looking at what lies outside the blocks while the blocks are worked on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event

from secateur.errors import NonFiniteError
from secateur.models.sources import Source

Progress = Callable[[str, int, int], None]


@contextmanager
def outside_checked(source: Source, progress: Progress) -> Iterator[Progress]:
    """Read embeddings and head in the background, and raise NonFiniteError when they hold NaN or inf.

    Gives the progress to report: it raises as soon as that is known. At the end of the block everything has been
    looked at.
    """
    stop = Event()
    with ThreadPoolExecutor(1, thread_name_prefix="check-outside") as pool:
        checked = pool.submit(source.check_outside, stop)

        def report(stage: str, done: int, total: int) -> None:
            progress(stage, done, total)
            if checked.done():
                checked.result()

        try:
            yield report
            checked.result()
        except NonFiniteError:
            # what an embedding holds may show in a block first, where it can't be told from what a block does
            checked.result()
            raise
        finally:
            stop.set()
