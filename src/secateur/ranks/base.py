"""What ranks can do, and one process alone, which does the same without anybody."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

Value = TypeVar("Value")
# name → statistic of every module; modules that share an input share one mapping
Seen = Mapping[str, dict[str, Any]]


class Ranks:
    """One process alone: all work is its own. ``rank`` counts from 0 to ``size`` - 1; ``main`` is rank 0."""

    rank, size = 0, 1

    @property
    def here(self) -> int:
        """How many ranks there are on this machine, which share its memory."""
        return 1

    @property
    def main(self) -> bool:
        """True on the rank that writes and speaks."""
        return self.rank == 0

    def device(self, name: str) -> str:
        """The device of this rank where ``name`` is asked for. Raises UsageError."""
        return name

    def part(self, ids: Tensor) -> Tensor:
        """The windows of this rank, [windows, length]: consecutive ones, the first for rank 0. Raises UsageError."""
        return ids

    def merge(self, seen: Seen) -> None:
        """Make every statistic in ``seen`` that of the windows of all ranks."""

    def meet(self) -> None:
        """Go on when all ranks have come here. Raises the error of one that failed."""

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is true on one rank at least."""
        return flag

    def on_main(self, work: Callable[[], Value]) -> Value:
        """Run ``work`` on rank 0 and give its result, which should be small, to all; errors are raised everywhere."""
        return work()

    @contextmanager
    def together(self) -> Iterator[None]:
        """Within the block, an error of one rank becomes an error of all."""
        yield


ALONE = Ranks()
