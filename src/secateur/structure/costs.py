"""What a traced network costs, whole or without some of its units: exact, and quick enough for many questions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from secateur.structure.anatomy import Cost
from secateur.structure.traced import Traced
from secateur.structure.units import Labels


@dataclass(frozen=True)
class _Term:
    """A product of the sizes of some dimensions, in parameters or in multiply-accumulates."""

    factors: tuple[int, ...]
    params: int = 0
    macs: int = 0
    bytes: int = 0


class Costs:
    """Parameters, multiply-accumulates of one call on the example inputs, and bytes of parameters, of a trace."""

    def __init__(self, trace: Traced) -> None:
        self._units = trace.units
        self._arrays: list[Labels] = []
        self._numbers: dict[int, int] = {}
        sizes = trace.element_sizes()
        self._terms = [
            _Term(self._factors(dims), params=1, bytes=sizes[name])
            for name, dims in trace.distinct_parameters().items()
            if name in sizes
        ]
        self._terms += [_Term(self._factors(work.factors), macs=work.times) for work in trace.work]

    def _factors(self, dims: Sequence[Labels]) -> tuple[int, ...]:
        numbers = []
        for labels in dims:
            if id(labels) not in self._numbers:
                self._numbers[id(labels)] = len(self._arrays)
                self._arrays.append(labels)
            numbers.append(self._numbers[id(labels)])
        return tuple(numbers)

    def without(self, removed: Iterable[int], grown: Mapping[int, int] | None = None) -> Cost:
        """The cost when these units have left, and ``grown`` ones are there as often as it says."""
        times = self._units.times(removed, grown or {})
        return self._sum([int(times[self._units.table(labels)].prod(axis=1).sum()) for labels in self._arrays])

    def _sum(self, kept: Sequence[int]) -> Cost:
        params = macs = size = 0
        for term in self._terms:
            count = 1
            for factor in term.factors:
                count *= kept[factor]
            params, macs, size = params + term.params * count, macs + term.macs * count, size + term.bytes * count
        return Cost(params, macs, size)

    def of(self, units: Sequence[int]) -> list[Cost]:
        """The cost of each of some units alone: what the network costs less without it."""
        number = self._units.flags(()).astype(np.int64) - 1
        number[list(units)] = np.arange(len(units))
        lost = [self._lost(labels, number, len(units)) for labels in self._arrays]
        found = np.zeros((len(units), 3), dtype=np.int64)
        for term in self._terms:
            touched = np.unique(np.concatenate([lost[f].nonzero()[0] for f in term.factors] or [np.zeros(0, int)]))
            if not len(touched):
                continue
            before = np.prod([len(self._arrays[f]) for f in term.factors], dtype=np.int64)
            after = np.ones(len(touched), dtype=np.int64)
            for factor in term.factors:
                after *= len(self._arrays[factor]) - lost[factor][touched]
            found[touched] += (before - after)[:, None] * np.array([term.params, term.macs, term.bytes])
        return [Cost(*map(int, row)) for row in found]

    def _lost(self, labels: Labels, number: NDArray[np.int64], count: int) -> NDArray[np.int64]:
        """How many positions of a dimension leave with each of the units."""
        found = number[self._units.table(labels)].reshape(-1)
        return np.bincount(found[found >= 0], minlength=count)
