"""What stays of every dimension when some units have left."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray

from secateur.structure.traced import Value
from secateur.structure.units import Labels, Units


class Kept:
    """Which positions stay when ``removed`` units have left."""

    def __init__(self, units: Units, removed: Iterable[int]) -> None:
        self._units = units
        self._flags = units.flags(removed)
        self._kept: dict[int, tuple[Labels, NDArray[np.bool_]]] = {}

    def kept(self, labels: Labels) -> NDArray[np.bool_]:
        """[positions] bool: True stays."""
        if id(labels) not in self._kept:
            # the array is held, so that its id stays its own
            gone = np.any(self._flags[self._units.table(labels)], axis=1)
            self._kept[id(labels)] = (labels, np.logical_not(gone))
        return self._kept[id(labels)][1]

    def size(self, labels: Labels) -> int:
        return int(self.kept(labels).sum())

    def shape(self, value: Value) -> list[int]:
        return [self.size(labels) for labels in value.dims]

    def index(self, labels: Labels) -> torch.Tensor | None:
        """Kept positions, ascending int64, or None when all stay."""
        kept = self.kept(labels)
        return None if kept.all() else torch.from_numpy(kept.nonzero()[0])

    def touches(self, value: Value) -> bool:
        return any(not self.kept(labels).all() for labels in value.dims)

    def renumber(self, labels: Labels, at: int) -> int:
        """Where position ``at``, which may be the end, lies among the kept ones."""
        return int(self.kept(labels)[:at].sum())
