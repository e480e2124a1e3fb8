"""Which positions of which tensors leave together: labels, a union-find over them, and products of labels.

Every position along every dimension of every tensor in a traced graph carries a *label*. Rules of operators only ever
say three things about labels: these two always leave together (``join``), these must stay (``pin``), and this one
leaves whenever any of those does (``product``: entry (head, lane) of a flattened dimension leaves with its head or
with its lane). What is left when all have spoken are the *units*: classes of labels that no product explains.

Law: what is said is kept exactly, or more than was said is joined or pinned; never less. So a cut along units is
always consistent, and at worst a choice is lost. The order in which things are said doesn't matter for that law.

Source: coupling by union-find, SPA (arXiv:2403.18955) §3; products make its head and group policies follow from the
graph.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.int64]
_REPEATS = "it repeats positions, which leave with all their repeats"


class Units:
    """The labels of one graph. Label arrays are int64, one entry per position, and are never changed in place."""

    def __init__(self) -> None:
        self._parent = np.zeros(1024, dtype=np.int64)
        # of a root: pinned, or bound to a product; such labels take the slow path
        self._special = np.zeros(1024, dtype=bool)
        self._count = 0
        self._pinned: dict[int, str] = {}
        self._bound: dict[int, tuple[int, ...]] = {}
        self._products: dict[tuple[int, int], int] = {}
        self._fixed: dict[str, int] = {}
        self._tables: dict[int, tuple[Labels, Labels]] = {}
        self._sets: dict[int, frozenset[int]] = {}

    # -- making labels -------------------------------------------------------------------------------------------

    def fresh(self, count: int) -> Labels:
        """``count`` labels that nothing is known about."""
        end = self._count + count
        if end > len(self._parent):
            grown = np.zeros(max(end, 2 * len(self._parent)), dtype=np.int64)
            grown[: self._count] = self._parent[: self._count]
            self._parent = grown
            self._special = np.concatenate([self._special, np.zeros(len(grown) - len(self._special), dtype=bool)])
        labels = np.arange(self._count, end, dtype=np.int64)
        self._parent[self._count : end] = labels
        self._count = end
        return labels

    def fixed(self, count: int, why: str) -> Labels:
        """Labels of ``count`` positions that stay; ``why`` is the reason."""
        if why not in self._fixed:
            label = self.fresh(1)
            self.pin(label, why)
            self._fixed[why] = int(label[0])
        return np.full(count, self._fixed[why], dtype=np.int64)

    def product(self, first: Labels, second: Labels) -> Labels:
        """Labels of positions that leave whenever ``first`` or ``second`` does, element by element."""
        first, second = self.roots(first), self.roots(second)
        if self._all_pinned(first):
            return second
        if self._all_pinned(second):
            return first
        pairs, where = np.unique(np.stack([first, second]), axis=1, return_inverse=True)
        made = np.array([self._product(int(a), int(b)) for a, b in pairs.T], dtype=np.int64)
        return made[where.reshape(-1)]

    def _product(self, first: int, second: int) -> int:
        if first in self._pinned or first == second:
            return second
        if second in self._pinned:
            return first
        key = (first, second)
        if key not in self._products:
            label = int(self.fresh(1)[0])
            self._bind(label, key)
            self._products[key] = label
        return self._products[key]

    def grid(self, factors: Sequence[Labels]) -> Labels:
        """Labels of several dimensions that are merged into one, row-major."""
        merged = factors[0]
        for factor in factors[1:]:
            n, m = len(merged), len(factor)
            merged = self.product(np.repeat(merged, m), np.tile(factor, n))
        return merged

    def split(self, labels: Labels, sizes: Sequence[int]) -> list[Labels]:
        """Labels of the dimensions of ``sizes`` into which one is split, row-major: the inverse of ``grid``."""
        if len(sizes) == 1:
            return [labels]
        rows, columns = sizes[0], math.prod(sizes[1:])
        first, rest = self._split_in_two(labels, rows, columns)
        return [first, *self.split(rest, sizes[1:])]

    def _split_in_two(self, labels: Labels, rows: int, columns: int) -> tuple[Labels, Labels]:
        if rows == 1:
            return self.fixed(1, "a dimension of size 1"), labels
        if columns == 1:
            return labels, self.fixed(1, "a dimension of size 1")
        roots = self.roots(labels).reshape(rows, columns)
        if (roots == roots[:, :1]).all():
            return roots[:, 0], self.fixed(columns, self._shared_reason(roots))
        if (roots == roots[:1]).all():
            return self.fixed(rows, self._shared_reason(roots)), roots[0]
        if self._special[roots].any():
            found = self._factor(roots)
            if found is not None:
                return found
        first, second = self.fresh(rows), self.fresh(columns)
        self.join(labels, self.grid([first, second]))
        return first, second

    def _shared_reason(self, roots: Labels) -> str:
        return self.reason(int(roots.flat[0])) or "its positions leave together"

    def _factor(self, roots: Labels) -> tuple[Labels, Labels] | None:
        """The factors of positions that are a grid already, or None."""
        sets = {int(r): self.units_of(int(r)) for r in np.unique(roots)}
        table = [[sets[int(r)] for r in row] for row in roots]
        rows = [frozenset.intersection(*row) for row in table]
        columns = [frozenset.intersection(*column) for column in zip(*table, strict=True)]
        if any(table[i][j] != rows[i] | columns[j] for i in range(len(rows)) for j in range(len(columns))):
            return None
        return self._labels_of(rows), self._labels_of(columns)

    def _labels_of(self, sets: Sequence[frozenset[int]]) -> Labels:
        found = []
        for units in sets:
            label = int(self.fixed(1, "nothing leaves along it")[0])
            for unit in sorted(units):
                label = self._product(label, unit)
            found.append(label)
        return np.array(found, dtype=np.int64)

    # -- saying things about them --------------------------------------------------------------------------------

    def join(self, first: Labels, second: Labels) -> None:
        """Position by position, ``first`` and ``second`` leave together."""
        if first is second:
            return
        self._forget()
        while True:
            first, second = self.roots(first), self.roots(second)
            differ = first != second
            if not differ.any():
                return
            first, second = first[differ], second[differ]
            special = self._special[first] | self._special[second]
            if not special.any():
                break
            for a, b in np.unique(np.stack([first[special], second[special]]), axis=1).T:
                self._join_special(int(a), int(b))
            first, second = first[~special], second[~special]
        while first.size:
            # a root hangs on a smaller one, so no cycle; where several claim one root, the others try again
            self._parent[np.maximum(first, second)] = np.minimum(first, second)
            first, second = self.roots(first), self.roots(second)
            differ = first != second
            first, second = first[differ], second[differ]

    def _join_special(self, a: int, b: int) -> None:
        a, b = self._root(a), self._root(b)
        if a == b:
            return
        if a in self._pinned or b in self._pinned:
            why = self._pinned.get(a) or self._pinned[b]
            self._pin_root(a, why)
            self._pin_root(b, why)
            return
        if a not in self._bound and b not in self._bound:
            self._hang(a, b)
            return
        if a not in self._bound:
            a, b = b, a
        mine = self.units_of(a)
        if b not in self._bound:
            if b in mine:
                self._keep(mine - {b})
            else:
                self._hang(b, a)
            return
        theirs = self.units_of(b)
        if not mine or not theirs:
            why = self.reason(a) or self.reason(b) or "it is coupled to positions that stay"
            for label in (a, b, *mine, *theirs):
                self._pin_root(self._root(label), why)
            return
        # by its units: one of its factors may hang on b, and would then lie inside itself
        self._bound[a] = self.factors_of(a)
        factors = self.factors_of(b)
        self._hang(b, a)
        self._bound.pop(b)
        only_mine = [u for u in self.factors_of(a) if u not in theirs]
        only_theirs = [u for u in factors if u not in mine]
        if len(only_mine) == len(only_theirs):
            # dimension by dimension: heads with heads, and their repeats with repeats
            for one, other in zip(only_mine, only_theirs, strict=True):
                self._join_special(one, other)
        elif not only_mine or not only_theirs:
            self._keep([*only_mine, *only_theirs])
        else:
            self._join_all(mine | theirs)

    def _keep(self, units: Iterable[int]) -> None:
        """These units stay: their leaving would take along what they are only repeats of."""
        for unit in units:
            self._pin_root(self._root(unit), _REPEATS)

    def _join_all(self, units: frozenset[int]) -> None:
        first, *others = sorted(units)
        for other in others:
            self._join_special(first, other)

    def _hang(self, child: int, root: int) -> None:
        self._parent[child] = root

    def _bind(self, root: int, factors: tuple[int, ...]) -> None:
        self._bound[root] = factors
        self._special[root] = True

    def pin(self, labels: Labels, why: str) -> None:
        """These positions stay; ``why`` is the reason."""
        self._forget()
        for root in np.unique(self.roots(labels)):
            self._pin_root(int(root), why)

    def _pin_root(self, root: int, why: str) -> None:
        if root in self._pinned:
            return
        self._pinned[root] = why
        self._special[root] = True
        for factor in self._bound.get(root, ()):
            self._pin_root(self._root(factor), why)

    # -- asking --------------------------------------------------------------------------------------------------

    def roots(self, labels: Labels) -> Labels:
        """One representative per class of labels that are the same."""
        found = self._parent[labels]
        while True:
            above = self._parent[found]
            if (above == found).all():
                break
            found = above
        self._parent[labels] = found
        return found

    def _root(self, label: int) -> int:
        while (above := int(self._parent[label])) != label:
            label = above
        return label

    def units_of(self, label: int) -> frozenset[int]:
        """The units with which a position leaves: none when it stays, one as a rule, several for a product."""
        root = self._root(label)
        if root in self._pinned:
            return frozenset()
        if root not in self._bound:
            return frozenset([root])
        return frozenset().union(*(self.units_of(factor) for factor in self._bound[root]))

    def factors_of(self, label: int) -> tuple[int, ...]:
        """``units_of`` in the order of the dimensions they came from, outer first."""
        root = self._root(label)
        if root in self._pinned:
            return ()
        if root not in self._bound:
            return (root,)
        return tuple(dict.fromkeys(u for factor in self._bound[root] for u in self.factors_of(factor)))

    def reason(self, label: int) -> str | None:
        """Why a position stays, or None when it may leave."""
        root = self._root(label)
        if root in self._pinned:
            return self._pinned[root]
        if root in self._bound and not self.units_of(root):
            return self.reason(self._bound[root][0])
        return None

    def _all_pinned(self, roots: Labels) -> bool:
        return bool(self._special[roots].all()) and all(int(r) in self._pinned for r in np.unique(roots))

    def table(self, labels: Labels) -> Labels:
        """The units of every position, [positions, most units of one position], filled up with -1.

        Remembered, since arrays of labels are shared by many tensors; what is said afterwards makes it forget.
        """
        known = self._tables.get(id(labels))
        if known is None:
            # the array itself is held, so that its id stays its own
            known = self._tables[id(labels)] = (labels, self._table(self.roots(labels)))
        return known[1]

    def positions(self, labels: Labels, units: Sequence[int]) -> tuple[NDArray[np.int64], ...]:
        """The positions of every unit along a dimension, ascending int64; none where the unit isn't there."""
        found: dict[int, list[int]] = {unit: [] for unit in units}
        for position, those in enumerate(self.table(labels).tolist()):
            for unit in those:
                if unit in found:
                    found[unit].append(position)
        return tuple(np.array(mine, dtype=np.int64) for mine in found.values())

    def _table(self, roots: Labels) -> Labels:
        special = self._special[roots]
        # as a rule a position is a unit
        if not special.any():
            return roots[:, None]
        several, where = np.unique(roots[special], return_inverse=True)
        sets = [sorted(self._remembered(r)) for r in several.tolist()]
        width = max(map(len, sets)) or 1
        table = np.full((len(roots), width), -1, dtype=np.int64)
        table[:, 0] = roots
        rows = np.array([s + [-1] * (width - len(s)) for s in sets], dtype=np.int64).reshape(-1, width)
        table[special] = rows[where.reshape(-1)]
        return table

    def _remembered(self, root: int) -> frozenset[int]:
        """``units_of``, remembered like tables."""
        if root not in self._sets:
            self._sets[root] = self.units_of(root)
        return self._sets[root]

    def _forget(self) -> None:
        self._tables.clear()
        self._sets.clear()

    def times(self, removed: Iterable[int], grown: Mapping[int, int]) -> NDArray[np.int64]:
        """[labels + 1] int64, how often each unit is there: never when removed, as ``grown`` says, or once.

        The last entry is that of -1. A position is there as often as the product over its units.
        """
        found = 1 - self.flags(removed).astype(np.int64)
        found[list(grown.keys())] = list(grown.values())
        return found

    def flags(self, removed: Iterable[int]) -> NDArray[np.bool_]:
        """[labels + 1] bool, True for units that leave; the last entry is that of -1."""
        found = np.zeros(self._count + 1, dtype=bool)
        found[list(removed)] = True
        return found
