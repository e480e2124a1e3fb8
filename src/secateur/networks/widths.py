"""The dimensions along which a call of a network shrinks, the widths at which it is timed, and its name in a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from secateur.structure.groups import TracedAnatomy
from secateur.structure.kept import Kept
from secateur.structure.traced import Value
from secateur.structure.units import Labels, Units

LEVELS = tuple(part / 8 for part in range(1, 9))
"""Shares of the units of a dimension that are kept when a call is timed."""
LETTERS = "ab"
MOST_DIMS = len(LETTERS)
"""Dimensions that shrink by themselves; where a call has more of them they shrink together."""


@dataclass(frozen=True)
class Width:
    """A dimension of a call that can shrink: its positions, and the units that can leave it, by group."""

    labels: Labels
    groups: tuple[tuple[int, ...], ...]

    def removed(self, share: float, step: int) -> set[int]:
        """Units that leave for about ``share`` of every group to stay, as many as a multiple of ``step``."""
        return {u for units in self.groups for u in units[kept_units(share, len(units), step) :]}

    def shares(self, units: Units, step: int) -> dict[float, set[int]]:
        """What stays of the dimension when it is timed, ascending, and the units that have left it then."""
        found: dict[float, set[int]] = {}
        for level in LEVELS:
            removed = self.removed(level, step)
            found.setdefault(Kept(units, removed).size(self.labels) / len(self.labels), removed)
        return dict(sorted(found.items()))


@dataclass(frozen=True)
class TimedCall:
    """A call of the graph, the dimensions along which it shrinks, and its name in a table."""

    node: Any
    widths: tuple[Width, ...]
    key: str


def kept_units(share: float, units: int, step: int) -> int:
    """How many of some units stay for about this share: all, or a multiple of ``step``."""
    return units if share == 1 else max(1, round(share * units / step)) * step


def narrowed(anatomy: TracedAnatomy, step: int) -> set[int]:
    """Units that leave for every group to be as narrow as calls are timed."""
    free = (tuple(units) for name, units in anatomy.ids.items() if anatomy[name].frozen is None)
    return {unit for units in free for unit in units[kept_units(LEVELS[0], len(units), step) :]}


class Widths:
    """The widths of the calls of a traced network, which are timed in steps of ``step`` units."""

    def __init__(self, anatomy: TracedAnatomy, step: int) -> None:
        self._units: Units = anatomy.trace.units
        self._step = step
        self._free = {u: name for name, units in anatomy.ids.items() if anatomy[name].frozen is None for u in units}
        self._groups: Mapping[str, tuple[int, ...]] = {name: tuple(units) for name, units in anatomy.ids.items()}

    def of(self, values: Iterable[Value]) -> tuple[Width, ...]:
        """The dimensions of what a call reads and makes along which groups can leave; those that share a group are
        one."""
        merged: list[tuple[Labels, set[str]]] = []
        for labels in (labels for value in values for labels in value.dims):
            names = {self._free[u] for u in np.unique(self._units.table(labels)).tolist() if u in self._free}
            if not names:
                continue
            shared = [one for one in merged if one[1] & names]
            merged = [one for one in merged if not one[1] & names]
            longest = max([labels, *(one[0] for one in shared)], key=len)
            merged.append((longest, names.union(*(one[1] for one in shared))))
        if len(merged) > MOST_DIMS:
            merged = [(max((one[0] for one in merged), key=len), set().union(*(one[1] for one in merged)))]
        return tuple(Width(labels, tuple(self._groups[name] for name in sorted(names))) for labels, names in merged)

    def place(self, widths: Sequence[Width], where: str) -> str:
        """`` on cpu; a 58, b 29+28+1 by 8``: where a call is timed, how many units its dimensions are made of, the
        step."""
        sums = ["+".join(str(len(units)) for units in width.groups) for width in widths]
        made_of = ", ".join(f"{letter} {units}" for letter, units in zip(LETTERS, sums, strict=False))
        return f" on {where}" + (f"; {made_of} by {self._step}" if made_of else "")

    def sizes(self, value: Value, widths: Sequence[Width]) -> str:
        """``8, 64a, 56, 56``: the sizes of a tensor, with the letters of what shrinks."""
        units = [{u for group in width.groups for u in group} for width in widths]

        def size(labels: Labels) -> str:
            here = set(np.unique(self._units.table(labels)).tolist())
            return f"{len(labels)}{''.join(LETTERS[i] for i, some in enumerate(units) if some & here)}"

        return ", ".join(map(size, value.dims))
