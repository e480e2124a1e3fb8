"""The smallest fraction removed with which something fits."""

from __future__ import annotations

from collections.abc import Callable

STEPS = 100
"""fractions removed are tried in steps of a hundredth"""


def first_true(holds: Callable[[int], bool], last: int) -> int | None:
    """The smallest of 1 .. ``last`` for which something holds that holds for all above it; None where it never does."""
    if not holds(last):
        return None
    low, high = 0, last
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
