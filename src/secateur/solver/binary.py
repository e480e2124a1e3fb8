"""Binary quadratic problems with a fixed number of ones: x'Qx is made small over x in {0, 1}^n with sum x = k.

A solver is any object with ``solve(Q, k)``; ``add_solver`` makes one known by a name. Everything here is numpy and
float64, so that solvers of others (annealers, quantum hardware, integer programmes) need nothing else. One that can do
with a ``Factored`` Q says so by ``takes_factored``; all others are given the whole matrix.

Sources: the annealing schedule is that of iCBS (arXiv:2411.17796, official code amazon-science/icbs); tabu search is
F. Glover's (1989).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from secateur.errors import UsageError, nearest

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

# problems that a search over all answers may take
_MOST_ANSWERS = 2_000_000
# of a matrix that are looked at in one go, so that they stay in the processor's cache
_ROWS = 128


class BinarySolver(Protocol):
    """Whatever solves a binary quadratic problem."""

    def solve(self, Q: Floats, k: int) -> Any:
        """x [n] of zeros and ones, k of them ones; ``Q`` is [n, n], symmetric, scaled, and 0 < k < n.

        The first k variables are the ones of the answer that is there already, or of what is left of it.
        """
        ...


@dataclass(frozen=True)
class Factored:
    """The symmetric [n, n] matrix diag(linear) + A A', which is never built: ``factor`` A is [n, r], r small."""

    factor: Floats
    linear: Floats

    def __len__(self) -> int:
        return len(self.linear)

    def whole(self) -> Floats:
        """The matrix itself."""
        return self.factor @ self.factor.T + np.diag(self.linear)

    def scaled(self) -> Factored:
        """With entries that are 1 on average, those that are nothing left out."""
        entries, total = self._sums
        scale = entries / total if entries else 1.0
        return Factored(self.factor * math.sqrt(scale), self.linear * scale)

    @property
    def size(self) -> float:
        """What the absolute values of all entries add up to."""
        return self._sums[1]

    @cached_property
    def _sums(self) -> tuple[int, float]:
        """(entries that aren't zero, the sum of their absolute values)."""
        entries, total = 0, 0.0
        for first in range(0, len(self), _ROWS):
            # what lies left of these rows is what lies above the diagonal in others
            rows = self.factor[first : first + _ROWS] @ self.factor[first:].T
            inner = rows[:, : len(rows)]
            inner[np.diag_indices(len(rows))] += self.linear[first : first + _ROWS]
            np.abs(rows, out=rows)
            entries += 2 * np.count_nonzero(rows) - np.count_nonzero(inner)
            total += 2 * float(rows.sum()) - float(inner.sum())
        return entries, total

    @cached_property
    def diagonal(self) -> Floats:
        """Its diagonal, [n]."""
        return self.linear + np.square(self.factor).sum(axis=1)

    def times(self, x: Floats) -> Floats:
        return self.linear * x + self.factor @ (self.factor.T @ x)

    def pairs(self, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> Floats:
        """Entries [rows, columns] of two sets that have nothing in common."""
        return self.factor[rows] @ self.factor[columns].T

    def exchange(self, on: int, off: int) -> Floats:
        """Row ``on`` less row ``off``."""
        change = self.factor @ (self.factor[on] - self.factor[off])
        change[on] += self.linear[on]
        change[off] -= self.linear[off]
        return change


class _Whole:
    """A matrix that is there, with the words of ``Factored``."""

    def __init__(self, Q: Floats) -> None:
        self.S = Q + Q.T
        self.S /= 2
        self.size, self.diagonal = float(np.abs(self.S).sum()), np.diagonal(self.S)

    def __len__(self) -> int:
        return len(self.S)

    def times(self, x: Floats) -> Floats:
        return self.S @ x

    def pairs(self, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> Floats:
        return self.S[np.ix_(rows, columns)]

    def exchange(self, on: int, off: int) -> Floats:
        # rows are columns, and lie side by side in memory
        return self.S[on] - self.S[off]


def energy(Q: Floats, x: Any) -> float:
    """x'Qx for x [n] of zeros and ones."""
    ones = np.asarray(x, dtype=np.float64)
    return float(ones @ (Q @ ones))


def minimise(solver: BinarySolver, Q: Floats | Factored, k: int) -> Bools:
    """The solver's x, bool [n], with exactly ``k`` ones; it sees Q scaled so that its entries are 1 on average.

    Raises UsageError when the solver gives something else.
    """
    n = len(Q)
    if k <= 0 or k >= n:
        return np.full(n, k > 0)
    given = np.asarray(solver.solve(_scaled(Q, solver), k))
    who = type(solver).__name__
    if given.shape != (n,) or not np.isin(given, (0, 1)).all():
        raise UsageError(f"{who}.solve must give {n} zeros and ones, it gave an array of shape {given.shape}")
    if int(given.sum()) != k:
        raise UsageError(f"{who}.solve must give {k} ones among {n} variables, it gave {int(given.sum())}")
    return given.astype(bool)


def start_with_fewer(Q: Floats | Factored, ones: int, k: int) -> NDArray[np.int64]:
    """The variables in an order that a solver may begin with, where only ``k`` of the first ``ones`` can stay ones.

    The others become zeros one by one, the one whose leaving gains most first.
    """
    S = Q if isinstance(Q, Factored) else _Whole(Q)
    x = np.arange(len(S)) < ones
    for _ in range(ones - k):
        leaving = np.where(x, S.diagonal - 2 * S.times(x.astype(np.float64)), math.inf)
        x[int(leaving.argmin())] = False
    return np.concatenate([np.flatnonzero(x), np.flatnonzero(~x)])


def _scaled(Q: Floats | Factored, solver: BinarySolver) -> Any:
    if isinstance(Q, Factored):
        if getattr(solver, "takes_factored", False):
            return Q.scaled()
        Q = Q.whole()
    entries = np.count_nonzero(Q)
    return Q * (entries / np.abs(Q).sum()) if entries else Q


@dataclass(frozen=True)
class Exhaustive:
    """Looks at every answer; for small problems. Raises UsageError for large ones."""

    def solve(self, Q: Floats, k: int) -> Bools:
        if math.comb(len(Q), k) > _MOST_ANSWERS:
            raise UsageError(
                f"an exhaustive search over {k} of {len(Q)} variables never ends: take another solver or a small block"
            )
        best = min(combinations(range(len(Q)), k), key=lambda ones: Q[np.ix_(ones, ones)].sum())
        return np.isin(np.arange(len(Q)), best)


@dataclass(frozen=True)
class SwapSearch:
    """The best exchange of a one with a zero, again and again; behind a minimum, tabu search for a deeper one.

    ``shortlist`` ones and zeros that gain most by themselves are paired; all pairs are looked at before a point counts
    as a minimum. There, what has been exchanged rests for ``tenure`` exchanges, as far as enough stay awake. After
    ``patience`` of them without a better answer the search begins again at the best one, of which some ones and zeros
    are exchanged by lot, ``kicks`` times.
    """

    takes_factored: ClassVar = True

    shortlist: int = 64
    tenure: int = 10
    patience: int = 50
    kicks: int = 8
    kicked: int = 8

    def solve(self, Q: Floats | Factored, k: int) -> Bools:
        S = Q if isinstance(Q, Factored) else _Whole(Q)
        lots, fewer = np.random.default_rng(0), min(k, len(S) - k)
        best, lowest = self._descend(S, np.arange(len(S)) < k)
        for _ in range(self.kicks):
            x = best.copy()
            count = min(self.kicked, fewer)
            on, off = (lots.permutation(np.flatnonzero(among))[:count] for among in (~x, x))
            x[on], x[off] = True, False
            x, found = self._descend(S, x)
            if found < lowest:
                best, lowest = x, found
        return best

    def _descend(self, S: Factored | _Whole, x: Bools) -> tuple[Bools, float]:
        """(the best answer on the way from x, its energy)."""
        n, field = len(S), S.times(x.astype(np.float64))
        tenure = min(self.tenure, min(int(x.sum()), n - int(x.sum())) - 1)
        tolerance = 1e-12 * S.size
        best, best_x, value, since, moves = 0.0, x.copy(), 0.0, 0, 0
        rests_until = np.zeros(n, dtype=np.int64)
        while since <= self.patience:
            awake = rests_until <= moves
            change, on, off = self._best(S, field, x, awake, self.shortlist)
            if since == 0 and change >= -tolerance:
                change, on, off = self._best(S, field, x, awake, n)
            moves += 1
            x[on], x[off] = True, False
            field += S.exchange(on, off)
            value += change
            if value < best - tolerance:
                best, best_x, since = value, x.copy(), 0
            else:
                since += 1
                # on the way down nothing has to rest
                rests_until[[on, off]] = moves + tenure
        ones = best_x.astype(np.float64)
        return best_x, float(ones @ S.times(ones))

    @staticmethod
    def _best(S: Factored | _Whole, field: Floats, x: Bools, awake: Bools, count: int) -> tuple[float, int, int]:
        """(change of the energy, variable that becomes one, variable that becomes zero)."""
        alone = S.diagonal + np.where(x, -2, 2) * field
        ons, offs = (_lowest(alone, np.flatnonzero(among), count) for among in (~x & awake, x & awake))
        best = math.inf, -1, -1
        for first in range(0, len(ons), _ROWS):
            some = ons[first : first + _ROWS]
            pairs = alone[some][:, None] + alone[offs][None, :] - 2 * S.pairs(some, offs)
            on, off = divmod(int(pairs.argmin()), len(offs))
            if pairs[on, off] < best[0]:
                best = float(pairs[on, off]), int(some[on]), int(offs[off])
        return best


def _lowest(values: Floats, among: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    return among if len(among) <= count else among[np.argsort(values[among], kind="stable")[:count]]


@dataclass(frozen=True)
class Annealing:
    """Simulated annealing by exchanges, with the published schedule; the best of ``restarts`` runs.

    beta grows from ``first`` to ``last`` by ``factor``, one sweep each. A sweep visits every variable and proposes to
    exchange it with one of the other value, drawn uniformly. A run ends early when a sweep changes nothing. Runs have
    the seeds 0, 1, ... and go side by side; none depends on how many there are.
    """

    restarts: int = 20
    first: float = 1e-3
    last: float = 100.0
    factor: float = 1.1

    def solve(self, Q: Floats, k: int) -> Bools:
        S, n, R = (Q + Q.T) / 2, len(Q), self.restarts
        x = np.tile(np.arange(n) < k, (R, 1))
        # the ones of every run, then its zeros, and where every variable stands among them
        members, places = np.tile(np.arange(n), (R, 1)), np.tile(np.arange(n), (R, 1))
        field = np.tile(S[:, :k].sum(axis=1), (R, 1))
        diagonal, lots = np.diagonal(S), [np.random.default_rng(seed) for seed in range(R)]
        running = np.arange(R)
        for beta in self._betas():
            drawn = np.stack([lots[r].random((2, n)) for r in running], axis=1)
            changed = np.zeros(len(running), dtype=bool)
            for i in range(n):
                one = x[running, i]
                place = np.where(one, k + (drawn[0, :, i] * (n - k)).astype(int), (drawn[0, :, i] * k).astype(int))
                j = members[running, place]
                on, off = np.where(one, j, i), np.where(one, i, j)
                change = diagonal[on] + diagonal[off] + 2 * (field[running, on] - field[running, off] - S[on, off])
                takes = np.log(drawn[1, :, i] + 1e-300) < -beta * change
                if not takes.any():
                    continue
                r, a, b = running[takes], on[takes], off[takes]
                changed |= takes
                x[r, a], x[r, b] = True, False
                field[r] += S[a] - S[b]
                at_a, at_b = places[r, a], places[r, b]
                members[r, at_a], members[r, at_b], places[r, a], places[r, b] = b, a, at_b, at_a
            running = running[changed]
            if not len(running):
                break
        # summed anew: what was added up on the way has rounding in it
        return x[int(np.argmin([energy(S, row) for row in x]))]

    def _betas(self) -> Iterator[float]:
        beta = self.first
        while beta <= self.last:
            yield beta
            beta *= self.factor


def penalty(n: int, k: int) -> tuple[Floats, float]:
    """(P, constant) with x'Px + constant = (sum x - k)^2, for solvers that know no constraint."""
    return np.ones((n, n)) - 2 * k * np.eye(n), float(k * k)


def ising(Q: Floats) -> tuple[Floats, Floats, float]:
    """(J, h, constant) with s'Js + h's + constant = x'Qx for x = (1 + s)/2, s in {-1, 1}^n; Q symmetric."""
    diagonal = np.diag(np.diagonal(Q))
    return (Q - diagonal) / 4, Q.sum(axis=1) / 2, float(Q.sum() + np.trace(Q)) / 4


_solvers: dict[str, BinarySolver] = {"exhaustive": Exhaustive(), "swap": SwapSearch(), "annealing": Annealing()}


def add_solver(name: str, solver: BinarySolver) -> None:
    """Make a solver of your own known as ``name``. Raises UsageError for a name that is taken."""
    if _solvers.get(name, solver) is not solver:
        raise UsageError(f"there is a solver named '{name}' already: take another name")
    if not callable(getattr(solver, "solve", None)):
        raise UsageError(f"a solver has a method solve(Q, k), {type(solver).__name__} has none")
    _solvers[name] = solver


def binary_solver(name: str) -> BinarySolver:
    """The solver of that name. Raises UsageError with the nearest one."""
    if name not in _solvers:
        raise UsageError(f"unknown solver '{name}'{nearest(name, _solvers) or ';'} known are {', '.join(_solvers)}")
    return _solvers[name]
