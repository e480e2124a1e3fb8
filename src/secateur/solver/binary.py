"""Binary quadratic problems with a fixed number of ones: x'Qx is made small over x in {0, 1}^n with sum x = k.

A solver is any object with ``solve(Q, k)``; ``add_solver`` makes one known by a name. Everything here is numpy and
float64, so that solvers of others (annealers, quantum hardware, integer programmes) need nothing else.

Sources: the annealing schedule is that of iCBS (arXiv:2411.17796, official code amazon-science/icbs); tabu search is
F. Glover's (1989).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from secateur.errors import UsageError, nearest

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

# problems that a search over all answers may take
_MOST_ANSWERS = 2_000_000


class BinarySolver(Protocol):
    """Whatever solves a binary quadratic problem."""

    def solve(self, Q: Floats, k: int) -> Any:
        """x [n] of zeros and ones, k of them ones; ``Q`` is [n, n], symmetric, scaled, and 0 < k < n.

        The first k variables are the ones of the answer that is there already.
        """
        ...


def energy(Q: Floats, x: Any) -> float:
    """x'Qx for x [n] of zeros and ones."""
    ones = np.asarray(x, dtype=np.float64)
    return float(ones @ (Q @ ones))


def minimise(solver: BinarySolver, Q: Floats, k: int) -> Bools:
    """The solver's x, bool [n], with exactly ``k`` ones; it sees Q scaled so that its entries are 1 on average.

    Raises UsageError when the solver gives something else.
    """
    n = len(Q)
    if k <= 0 or k >= n:
        return np.full(n, k > 0)
    entries = np.count_nonzero(Q)
    given = np.asarray(solver.solve(Q * (entries / np.abs(Q).sum()) if entries else Q, k))
    who = type(solver).__name__
    if given.shape != (n,) or not np.isin(given, (0, 1)).all():
        raise UsageError(f"{who}.solve must give {n} zeros and ones, it gave an array of shape {given.shape}")
    if int(given.sum()) != k:
        raise UsageError(f"{who}.solve must give {k} ones among {n} variables, it gave {int(given.sum())}")
    return given.astype(bool)


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

    shortlist: int = 64
    tenure: int = 10
    patience: int = 50
    kicks: int = 8
    kicked: int = 8

    def solve(self, Q: Floats, k: int) -> Bools:
        S = Q + Q.T
        S /= 2
        lots, fewer = np.random.default_rng(0), min(k, len(Q) - k)
        tolerance = 1e-12 * float(np.abs(S).sum())
        best = self._descend(S, np.arange(len(Q)) < k, tolerance)
        lowest = energy(S, best)
        for _ in range(self.kicks):
            x = best.copy()
            count = min(self.kicked, fewer)
            on, off = (lots.permutation(np.flatnonzero(among))[:count] for among in (~x, x))
            x[on], x[off] = True, False
            x = self._descend(S, x, tolerance)
            if (found := energy(S, x)) < lowest:
                best, lowest = x, found
        return best

    def _descend(self, S: Floats, x: Bools, tolerance: float) -> Bools:
        n, field = len(S), S @ x.astype(np.float64)
        tenure = min(self.tenure, min(int(x.sum()), n - int(x.sum())) - 1)
        best, best_x, value, since, moves = 0.0, x.copy(), 0.0, 0, 0
        rests_until = np.zeros(n, dtype=np.int64)
        while since <= self.patience:
            awake = rests_until <= moves
            change, on, off = self._best(S, field, x, awake, self.shortlist)
            if since == 0 and change >= -tolerance:
                change, on, off = self._best(S, field, x, awake, n)
            moves += 1
            x[on], x[off] = True, False
            # rows are columns, and lie side by side in memory
            field += S[on] - S[off]
            value += change
            if value < best - tolerance:
                best, best_x, since = value, x.copy(), 0
            else:
                since += 1
                # on the way down nothing has to rest
                rests_until[[on, off]] = moves + tenure
        return best_x

    @staticmethod
    def _best(S: Floats, field: Floats, x: Bools, awake: Bools, count: int) -> tuple[float, int, int]:
        """(change of the energy, variable that becomes one, variable that becomes zero)."""
        alone = np.diagonal(S) + np.where(x, -2, 2) * field
        ons, offs = (_lowest(alone, np.flatnonzero(among), count) for among in (~x & awake, x & awake))
        pairs = alone[ons][:, None] + alone[offs][None, :] - 2 * S[np.ix_(ons, offs)]
        on, off = divmod(int(pairs.argmin()), len(offs))
        return float(pairs[on, off]), int(ons[on]), int(offs[off])


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
