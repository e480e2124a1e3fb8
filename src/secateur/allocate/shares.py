"""From the sparsities that an allocator wishes for to those that matrices get: the whole is met, and each is possible.

Laws: the weights removed are those asked for, to within half of the smallest step that a matrix can take; a wish that
meets the whole already is left as it is; a matrix that is to lose more than another still does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from secateur.errors import BudgetError


def part_of(count: int, fraction: float) -> int:
    """``fraction`` of ``count`` things, rounded down as methods do; 0.575 of 40 are 23, although 0.575 * 40 < 23."""
    return int(round(count * fraction, 6))


# the largest sparsity that a wish is cut off at, unless more is asked for of the whole (Adapt-Pruner's bound)
MOST = 0.99


def fit_sparsities(wished: ArrayLike, sizes: ArrayLike, sparsity: float, *, most: float = MOST) -> NDArray[np.float64]:
    """Sparsities [parts] float64 in [0, most] that remove ``sparsity`` of all weights: the wish, shifted by one number.

    ``sizes`` are the weights of every part. The shift is the smallest change (in least squares, weighted by size) that
    meets the whole.
    """
    return within(wished, sizes, sparsity, max(most, sparsity))


def within(wished: ArrayLike, sizes: ArrayLike, sparsity: float, most: ArrayLike) -> NDArray[np.float64]:
    """``fit_sparsities`` with a bound that may be another for every part; below the target where all are at theirs."""
    wish, weights = np.asarray(wished, dtype=np.float64), np.asarray(sizes, dtype=np.float64)
    most = np.asarray(most, dtype=np.float64)

    def shifted(by: float) -> NDArray[np.float64]:
        return np.clip(wish + by, 0.0, most)

    target = sparsity * weights.sum()
    plain = wish + (target - (weights * wish).sum()) / weights.sum()
    if plain.min() >= 0 and bool((plain <= most).all()):
        return plain
    low, high = -float(wish.max()), float(most.max() - wish.min())
    while low < (middle := (low + high) / 2) < high:
        low, high = (low, middle) if (weights * shifted(middle)).sum() >= target else (middle, high)
    return shifted(high)


def removed_counts(sparsities: ArrayLike, sizes: Sequence[int], steps: Sequence[int], sparsity: float) -> list[int]:
    """How many weights each matrix loses: a multiple of its step, less than all of it; the sum is what is asked for.

    ``steps`` are the numbers of weights by which a matrix's loss can grow: 1 where its entries compete, the number of
    rows where every row loses the same. What rounding leaves over goes to the matrices after it, those with the
    smallest steps last, so that the sum is off by at most half of the smallest step (of those that aren't at an end).
    Raises BudgetError when that is impossible.
    """
    found = [float(s) * size for s, size in zip(np.asarray(sparsities, dtype=np.float64), sizes, strict=True)]
    over = sparsity * sum(sizes) - sum(found)
    # in the second pass only what matrices that were at an end could not take is still over
    for _ in range(2):
        for i in sorted(range(len(sizes)), key=lambda i: -steps[i]):
            most = (sizes[i] - 1) // steps[i]
            taken = min(max(math.floor((found[i] + over) / steps[i] + 0.5), 0), most) * steps[i]
            over += found[i] - taken
            found[i] = taken
    counts = [int(count) for count in found]
    if abs(over) > max(steps) / 2 + 1e-9 * sum(sizes):
        raise BudgetError(
            f"{sparsity:.1%} of the weights can't leave: {sum(counts) / sum(sizes):.1%} can when no matrix loses all"
        )
    return counts


def mixed_patterns(sparsities: ArrayLike, sizes: Sequence[int], n: int, m: int) -> list[int]:
    """N of every part for N:M with one M: whole numbers in [0, m), n/m of all weights leave.

    Parts are rounded to the nearest; those that were rounded furthest move by one until the whole is met, as near as
    whole numbers come.
    """
    wish = np.asarray(sparsities, dtype=np.float64) * m
    weights = np.asarray(sizes, dtype=np.int64)
    found = np.clip(np.floor(wish + 0.5), 0, m - 1).astype(np.int64)
    target = n * int(weights.sum())
    while (over := int((weights * found).sum()) - target) != 0:
        sign = 1 if over > 0 else -1
        movable = (found - sign >= 0) & (found - sign <= m - 1) & (np.abs(over - sign * weights) < abs(over))
        if not movable.any():
            break
        residual = np.where(movable, sign * (found - wish), -np.inf)
        found[int(residual.argmax())] -= sign
    return found.tolist()


def normalised(importance: ArrayLike) -> NDArray[np.float64]:
    """Importances of the blocks with mean 0 and largest absolute value 1; all 0 where they are equal."""
    values = np.asarray(importance, dtype=np.float64)
    centred = values - values.mean()
    largest = np.abs(centred).max()
    # what rounding leaves of equal values is no difference
    return centred / largest if largest > 1e-12 * np.abs(values).max() else np.zeros_like(centred)
