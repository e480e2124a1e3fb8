"""Groups at levels: how many units every group loses at each level of a search, in whole units.

    level e of a group   it loses rungs[centre + e * step] units,   e = -half..half, as far as there are rungs

A rung is one bundle of units: as many neurons as are rounded to, one query head of every key-value group, or one unit.
The step is the same for all groups of a kind, so that a group one level up and another one down keep what the kind
loses exactly as it is; where units don't fill bundles the first rung is smaller, and goes with its like alone.

Source: G. Li et al., "Tyr-the-Pruner", 2025, arXiv:2503.09657, and its official code: steps of an eighth, never below
one head or 32 neurons, halved from one search to the next.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

from secateur.allocate.units import ROUNDED, Limits, refusal
from secateur.structure import Group

LEAST_NEURONS = 32
"""A step is this many neurons at least, or an eighth of the neurons where these are fewer than 256."""


def rungs_of(group: Group, limits: Limits) -> tuple[int, ...]:
    """The numbers of units that may leave a group, ascending from 0.

    Where units don't fill bundles, the remainder leaves with the first one.
    """
    bundle = _bundle(group, limits)
    least = math.ceil(limits.min_keep * group.balance / bundle)
    bundles = math.ceil(group.units / bundle)
    return (0, *(group.units - kept * bundle for kept in range(bundles - 1, least - 1, -1)))


def _bundle(group: Group, limits: Limits) -> int:
    return max(group.balance, limits.round_to if group.kind in ROUNDED else 1)


def even_start(groups: Sequence[Group], sparsity: float, total: int, limits: Limits) -> tuple[int, ...]:
    """The rung of every group when all lose the same share, in units of the budget.

    Coarse groups together lose the nearest number of heads to their share, spread evenly over the layers; neurons make
    up for what is left of the budget, spread in the same way. ``total`` is the cost that the sparsity counts. Raises
    BudgetError.
    """
    wanted = sparsity * total
    fine = [g for g in groups if g.kind == "neuron"] or list(groups)
    coarse = [g for g in groups if g.kind != fine[0].kind]
    many, few = _Rungs(fine, limits), _Rungs(coarse, limits)
    heads = min(_nearest(sparsity * sum(few.sizes)), few.most)
    tried: set[int] = set()
    while True:
        rest = wanted - few.cost(heads)
        short, over = rest >= many.whole + many.last / 2, rest < -many.last / 2
        if not (short or over) or heads in tried:
            break
        tried.add(heads)
        # what one kind has too little of the other one makes up for
        heads += 1 if short else -1
        if not 0 <= heads <= few.most:
            raise refusal(sparsity, few.whole + many.whole, total, limits)
    found = [*few.spread(heads), *many.spread(many.nearest(rest))]
    at = {g.name: rung for g, rung in zip([*coarse, *fine], found, strict=True)}
    return tuple(at[g.name] for g in groups)


class _Rungs:
    """Groups of a kind and what they cost at every rung: ``most`` rungs together, of which the largest ``whole``.

    ``sizes`` are the bundles that every group is made of, and ``last`` is the cost of one that leaves last.
    """

    def __init__(self, groups: Sequence[Group], limits: Limits) -> None:
        self.sizes = [math.ceil(g.units / _bundle(g, limits)) for g in groups]
        # of every group, by rung; the first rung may be no whole bundle
        self._costs = [[limits.cost(g.cost) * lost for lost in rungs_of(g, limits)] for g in groups]
        self._rooms = [len(costs) - 1 for costs in self._costs]
        self.most = sum(self._rooms)
        self.whole = sum(costs[-1] for costs in self._costs)
        bundles = [limits.cost(g.cost) * _bundle(g, limits) for g in groups]
        lasts = (c[-1] - c[-2] if len(c) > 1 else b for c, b in zip(self._costs, bundles, strict=True))
        self.last = min(lasts, default=0)

    def spread(self, count: int) -> list[int]:
        """The rung of every group when all together go up so many."""
        return _spread(self.sizes, self._rooms, count)

    def cost(self, count: int) -> int:
        """What leaves then, in units of the budget."""
        return sum(costs[rung] for costs, rung in zip(self._costs, self.spread(count), strict=True))

    def nearest(self, wanted: float) -> int:
        """The count at which what leaves is nearest to ``wanted``, the larger one of two."""
        count = bisect_left(range(self.most + 1), wanted, key=self.cost)
        return min((c for c in (count, count - 1) if 0 <= c <= self.most), key=lambda c: abs(self.cost(c) - wanted))


def _nearest(value: float) -> int:
    return math.floor(value + 0.5)


def _spread(sizes: Sequence[int], rooms: Sequence[int], count: int) -> list[int]:
    """``count`` things over places in proportion to their sizes, none of which takes more than its room."""
    found, reached, total = [], 0, sum(sizes)
    for place, room in enumerate(rooms):
        upto = _nearest(count * sum(sizes[: place + 1]) / total)
        found.append(min(upto - reached, room))
        reached = upto
    left = count - sum(found)
    while left:
        for place, room in enumerate(rooms):
            if left and found[place] < room:
                found[place] += 1
                left -= 1
    return found


@dataclass(frozen=True)
class Grid:
    """The levels of all groups around ``centre``, the rung of every group at level 0.

    ``steps`` are in rungs, ``kinds`` those of the groups, ``half`` the levels to either side.
    """

    rungs: tuple[tuple[int, ...], ...]
    kinds: tuple[str, ...]
    steps: tuple[int, ...]
    half: int
    centre: tuple[int, ...]

    @classmethod
    def of(cls, groups: Sequence[Group], centre: tuple[int, ...], limits: Limits, *, step: float, half: int) -> Grid:
        """``step`` is a fraction of the units of a group, on average over those of its kind."""
        rungs = tuple(rungs_of(g, limits) for g in groups)
        kinds = tuple(g.kind for g in groups)
        steps = {kind: _step([g for g in groups if g.kind == kind], step, limits) for kind in kinds}
        return cls(rungs, kinds, tuple(steps[kind] for kind in kinds), half, centre)

    def ranges(self) -> list[range]:
        """The levels that every group has: those that would lose less than nothing, or too much, are left out."""
        found = []
        for rungs, step, centre in zip(self.rungs, self.steps, self.centre, strict=True):
            low, high = centre // step, (len(rungs) - 1 - centre) // step
            found.append(range(-min(low, self.half), min(high, self.half) + 1))
        return found

    def removed(self, group: int, level: int) -> int:
        """Units that a group, by its place, loses at a level."""
        return self.rungs[group][self.centre[group] + level * self.steps[group]]

    def at(self, levels: Sequence[int]) -> Grid:
        """The same around these levels."""
        moved = (c + level * step for c, level, step in zip(self.centre, levels, self.steps, strict=True))
        return replace(self, centre=tuple(moved))


def _step(groups: Sequence[Group], fraction: float, limits: Limits) -> int:
    units, bundle = sum(g.units for g in groups) / len(groups), _bundle(groups[0], limits)
    least = min(LEAST_NEURONS, units / 8) if groups[0].kind == "neuron" else bundle
    return max(1, math.ceil(least / bundle), _nearest(fraction * units / bundle))
