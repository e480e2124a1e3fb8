"""Spreading a budget over the coupled channels of any network, where what a channel costs depends on the others.

A channel of a convolution is cheaper when the layers before and after it have become narrower, so costs don't add up.
Units are put in one order of leaving, and the exact cost of the network without the first m of them decides m.

Laws: the budget is met within one bundle; a larger sparsity removes all that a smaller one does; sparsity 0 nothing. A
measured cost may rise when a unit leaves: then the budget is met where the cost crosses it, and the second law need not
hold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from torch import Tensor

from secateur.allocate.units import Bundle, Kept, Limits, bundles, kept_units
from secateur.errors import BudgetError
from secateur.structure import Group

SCOPES = ("global", "uniform")
CostOf = Callable[[Mapping[str, Tensor]], float]
"""Kept units by group → what the network then costs, in the unit of the budget."""


def allocate_channels(
    scores: Mapping[str, Tensor],
    groups: Sequence[Group],
    sparsity: float,
    scope: str,
    limits: Limits,
    cost: CostOf,
    dense: float | None = None,
    shares: Mapping[str, float] = MappingProxyType({}),
) -> Kept:
    """Kept units of every group, so that ``sparsity`` of the cost of the whole network is gone.

    ``dense`` is that cost, by default with all units of the groups. ``scope``: ``global`` ranks all units on one
    scale, ``uniform`` takes the same share of every group. ``shares`` are fractions of the units of groups that leave
    whatever it takes, by name of the group; the others make up the rest of the budget.
    Raises BudgetError when the minimum kept costs more.
    """
    forced: list[Bundle] = []
    free: list[tuple[float, Bundle]] = []
    for group in groups:
        ordered = bundles(group, scores[group.name], limits)
        least = _least(ordered, limits)
        if group.name in shares:
            forced += ordered[: max(least, round((1 - shares[group.name]) * len(ordered)))]
            continue
        forced += ordered[:least]
        for place, bundle in enumerate(ordered[least:], start=least):
            # the last of a group leaves first; in a uniform cut the same share of every group has left at any time
            free.append((bundle.value if scope == "global" else -place / len(ordered), bundle))
    free.sort(key=lambda one: one[0])
    order = [bundle for _, bundle in free]
    total = cost(kept_units(forced + order, groups)) if dense is None else dense
    target = (1 - sparsity) * total
    smallest = cost(kept_units(forced, groups))
    if smallest > target and sparsity > 0 and not _near(smallest, target, total, len(order)):
        raise BudgetError(
            f"can't remove {sparsity:.1%} of the {limits.budget}: with at least {limits.min_keep} unit(s) kept in every"
            f" group at most {1 - smallest / total if total else 0:.1%} can go"
        )
    return kept_units(forced + order[_first_within(order, forced, groups, target, cost) :], groups)


def _near(smallest: float, target: float, total: float, count: int) -> bool:
    """Whether the least that can stay misses the target by no more than a unit on average."""
    return bool(count) and smallest - target <= (total - smallest) / count / 2


def _first_within(
    order: Sequence[Bundle], forced: Sequence[Bundle], groups: Sequence[Group], target: float, cost: CostOf
) -> int:
    """How many bundles must leave for the cost to come nearest to ``target``, by bisection."""

    def after(count: int) -> float:
        return cost(kept_units([*forced, *order[count:]], groups))

    low, high = 0, len(order)
    while low < high:
        middle = (low + high) // 2
        if after(middle) <= target:
            high = middle
        else:
            low = middle + 1
    if low > 0 and after(low - 1) - target <= target - after(low):
        return low - 1
    return low


def _least(ordered: Sequence[Bundle], limits: Limits) -> int:
    """Number of bundles that hold at least ``min_keep`` units, and one that isn't a remainder."""
    held = 0
    for count, bundle in enumerate(ordered, start=1):
        held += len(bundle.units)
        if held >= limits.min_keep:
            return count
    return len(ordered)
