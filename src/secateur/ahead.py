"""Work done in the background a little ahead of its use, as reading is while something else computes or writes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

# What waits to be used takes at most this much beside the piece that is made, unless a single piece is larger.
AHEAD_BYTES = 1 << 23

Value = TypeVar("Value")
# (bytes of the result, what gives it)
Task = tuple[int, Callable[[], Value]]


def ahead(tasks: Iterable[Task[Value]]) -> Generator[Value]:
    """The results in the order of the tasks; while one is in use, those after it are made one by one.

    An error is raised where its result would have come.
    """
    left = iter(tasks)
    waiting: deque[tuple[int, Future[Value]]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as pool:

        def begin() -> None:
            while not waiting or sum(size for size, _ in waiting) < AHEAD_BYTES:
                task = next(left, None)
                if task is None:
                    return
                waiting.append((task[0], pool.submit(task[1])))

        try:
            begin()
            while waiting:
                result = waiting.popleft()[1]
                begin()
                yield result.result()
                # a result must not live on until the next one is there
                del result
        finally:
            for _, unused in waiting:
                unused.cancel()
