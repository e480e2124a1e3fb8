"""What stays of every dimension when some units have left, and others are there more than once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from secateur.structure.traced import Value
from secateur.structure.units import Labels, Units


class Kept:
    """Which positions stay when ``removed`` units have left and ``grown`` ones are there several times.

    Copies of a position lie side by side.
    """

    def __init__(self, units: Units, removed: Iterable[int], grown: Mapping[int, int] | None = None) -> None:
        self._units = units
        self._unit_times = units.times(removed, grown or {})
        self._times: dict[int, tuple[Labels, NDArray[np.int64]]] = {}

    def times(self, labels: Labels) -> NDArray[np.int64]:
        """[positions] int64: how often each position is there; 0 has left."""
        if id(labels) not in self._times:
            # the array is held, so that its id stays its own
            self._times[id(labels)] = (labels, self._unit_times[self._units.table(labels)].prod(axis=1))
        return self._times[id(labels)][1]

    def kept(self, labels: Labels) -> NDArray[np.bool_]:
        """[positions] bool: True stays."""
        return self.times(labels) > 0

    def unchanged(self, labels: Labels) -> bool:
        """Whether every position is there once."""
        return bool((self.times(labels) == 1).all())

    def size(self, labels: Labels) -> int:
        return int(self.times(labels).sum())

    def shape(self, value: Value) -> list[int]:
        return [self.size(labels) for labels in value.dims]

    def index(self, labels: Labels) -> torch.Tensor | None:
        """Positions that stay, ascending int64 and as often as they are there, or None when all stay once."""
        if self.unchanged(labels):
            return None
        return torch.from_numpy(np.repeat(np.arange(len(labels)), self.times(labels)))

    def touches(self, value: Value) -> bool:
        return any(not self.unchanged(labels) for labels in value.dims)

    def renumber(self, labels: Labels, at: int) -> int:
        """Where position ``at``, which may be the end, lies among what stays."""
        return int(self.times(labels)[:at].sum())
