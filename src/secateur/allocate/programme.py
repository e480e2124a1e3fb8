"""Several budgets at once: how many units every group keeps, by an integer programme.

    minimise    sum over groups g of loss_g(v_g)
    subject to  sum over groups g of cost_bg(v_g) <= limit_b        for every budget b

A variant v of a group keeps its best units down to some number; exactly one is taken of every group, or, for widths
that are equal in every layer, of all groups of a kind. What variants lose is assumed to add up. Costs are exact or
measured, and needn't be linear. HiGHS solves it, by branch and bound.

Source: A. Bercovich et al., "Puzzle: Distillation-Based NAS for Inference-Optimized LLMs", arXiv:2411.19146, §4: an
integer programme over block variants under memory, latency and throughput, with scores of one variant at a time.

Laws: every budget is met; no other choice of variants that meets them loses less, as far as the solver can tell apart
what is within ``GAP`` of each other and proves it within ``NODES`` branches; a second budget never lowers the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from secateur.allocate.units import Bundle, Kept, Limits, Scores, bundles, kept_units, least_bundles
from secateur.errors import BudgetError, UsageError
from secateur.structure import Group

Numbers = NDArray[np.float64]

LEVELS = 48
"""Variants of a group besides the whole one, at most: 1536 neurons are kept in steps of 32."""
GAP = 1e-4
"""Relative distance to the optimum at which the solver stops."""
INFEASIBLE = 2
"""What scipy's ``milp`` says of a programme that has no solution."""
NODES = 1000
"""Branches that it looks at, at most: among many variants that are as good as each other, a proof can take forever."""


@dataclass(frozen=True)
class Budget:
    """``fraction`` of the ``dense`` cost may stay.

    ``saved`` is what leaves with the units of a group, by its name: [units + 1] float64, entry k where k are kept.
    ``unit`` is that of the costs.
    """

    name: str
    fraction: float
    dense: float
    saved: Mapping[str, Numbers]
    unit: str = ""


@dataclass(frozen=True)
class Slot:
    """Groups of which the same number of bundles stays: one, or all of a kind; ``counts`` are its variants."""

    groups: tuple[Group, ...]
    ordered: Mapping[str, Sequence[Bundle]]
    counts: tuple[int, ...]

    def kept(self, group: Group, count: int) -> int:
        """Units in the first ``count`` bundles of a group."""
        return sum(len(bundle.units) for bundle in self.ordered[group.name][:count])

    def saved(self, budget: Budget) -> Numbers:
        """What every variant saves, [variants]."""
        rows = [[budget.saved[g.name][self.kept(g, count)] for count in self.counts] for g in self.groups]
        return np.asarray(rows, dtype=np.float64).sum(axis=0)


Losses = Callable[[Group, Sequence[Bundle], Sequence[int]], Numbers]
"""(group, its bundles from the best one, counts of bundles) → what is lost when that many are kept, [counts]."""


@dataclass(frozen=True)
class ProgrammeAllocator:
    """Units that stay so that all ``budgets`` are met and the sum of ``losses`` is least."""

    budgets: tuple[Budget, ...]
    losses: Losses
    uniform: bool = False

    def allocate(self, scores: Scores, groups: Sequence[Group], total: int, limits: Limits) -> Kept:
        slots = slots_of(scores, groups, limits, uniform=self.uniform)
        costs, allowed = self._costs(slots)
        losses = [
            np.sum([self.losses(g, slot.ordered[g.name], slot.counts) for g in slot.groups], axis=0) for slot in slots
        ]
        chosen = choose(losses, costs, allowed)
        if chosen is None:
            raise self._infeasible(costs, allowed, limits)
        kept = [b for slot, at in zip(slots, chosen, strict=True) for b in _best(slot, slot.counts[at])]
        return kept_units(kept, groups)

    def check(self, groups: Sequence[Group], limits: Limits) -> None:
        """Raises BudgetError when the budgets can't be met, whatever the scores are."""
        scores = {g.name: torch.zeros(g.units) for g in groups}
        costs, allowed = self._costs(slots_of(scores, groups, limits, uniform=self.uniform))
        if choose([np.zeros(len(one)) for one in costs], costs, allowed) is None:
            raise self._infeasible(costs, allowed, limits)

    def _costs(self, slots: Sequence[Slot]) -> tuple[list[Numbers], Numbers]:
        """([variants, budgets] of every slot, [budgets] limits), as fractions of the dense costs.

        Costs count what a variant saves, so that limits are negative: whatever can't be cut stays out of it.
        """
        costs = [np.stack([-slot.saved(b) / b.dense for b in self.budgets], axis=1) for slot in slots]
        return costs, np.array([b.fraction - 1 for b in self.budgets])

    def _infeasible(self, costs: Sequence[Numbers], allowed: Numbers, limits: Limits) -> BudgetError:
        kept = f"with at least {limits.min_keep} unit(s) kept in every group"
        least = 1 + np.sum([one.min(axis=0) for one in costs], axis=0)
        for budget, reach in zip(self.budgets, least.tolist(), strict=True):
            if reach > budget.fraction:
                return BudgetError(
                    f"budget {budget.name}={budget.fraction:g} can't be met: {kept} the model takes at least"
                    f" {_rounded_up(reach)} of its {budget.name}"
                )
        # each can be met alone: as much of the last one as the others leave possible
        *others, last = self.budgets
        best = choose([one[:, -1] for one in costs], [one[:, :-1] for one in costs], allowed[:-1])
        named = " and ".join(f"{b.name}={b.fraction:g}" for b in others)
        if best is None:
            return BudgetError(f"budgets {named} can't be met together {kept}")
        reach = 1 + sum(float(one[at, -1]) for one, at in zip(costs, best, strict=True))
        return BudgetError(
            f"budgets {named} and {last.name}={last.fraction:g} can't be met together: {kept} and {named} the model"
            f" takes at least {_rounded_up(reach)} of its {last.name}"
        )


def slots_of(scores: Scores, groups: Sequence[Group], limits: Limits, *, uniform: bool) -> list[Slot]:
    """The choices that there are to make. Raises UsageError when groups that must become equal are not equal."""
    ordered = {g.name: bundles(g, scores[g.name], limits) for g in groups}
    pools: dict[str, list[Group]] = {}
    for group in groups:
        pools.setdefault(group.kind if uniform else group.name, []).append(group)
    for first, *rest in pools.values():
        for group in rest:
            if group.units != first.units:
                raise UsageError(
                    f"uniform widths need the same sizes in every layer: {group.name} has {group.units} units and"
                    f" {first.name} has {first.units}"
                )
    return [
        Slot(tuple(some), {g.name: ordered[g.name] for g in some}, _counts(some[0], ordered[some[0].name], limits))
        for some in pools.values()
    ]


def _counts(group: Group, ordered: Sequence[Bundle], limits: Limits) -> tuple[int, ...]:
    """How many bundles variants keep, ascending: equal steps down from all of them, and the least number."""
    least = least_bundles(group, ordered, limits)
    step = max(1, -(-(len(ordered) - least) // LEVELS))
    return tuple(sorted({least, *range(len(ordered), least, -step)}))


def _best(slot: Slot, count: int) -> list[Bundle]:
    return [bundle for group in slot.groups for bundle in slot.ordered[group.name][:count]]


def choose(losses: Sequence[Numbers], costs: Sequence[Numbers], limits: Numbers) -> list[int] | None:
    """The variant of every slot with the least sum of losses whose sums of costs stay within the limits.

    ``losses`` are [variants] and ``costs`` [variants, budgets] of every slot. None when there is no such choice.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array

    sizes = [len(one) for one in losses]
    flat, spent = np.concatenate(losses), np.concatenate(costs)
    rows = np.repeat(np.arange(len(sizes)), sizes)
    one_each = coo_array((np.ones(len(flat)), (rows, np.arange(len(flat)))), shape=(len(sizes), len(flat)))
    constraints = [LinearConstraint(one_each.tocsr(), 1, 1)]
    if spent.shape[1]:
        # the solver's tolerances are absolute
        scale = np.maximum(np.abs(spent).max(axis=0), np.finfo(float).tiny)
        slack = 1e-9 * np.maximum(np.abs(limits), scale)
        constraints.append(LinearConstraint((spent / scale).T, -np.inf, (limits + slack) / scale))
    span = float(flat.max() - flat.min()) or 1.0
    programme = {"integrality": np.ones(len(flat)), "bounds": Bounds(0, 1), "constraints": constraints}
    found = milp(flat / span, **programme, options={"mip_rel_gap": GAP, "node_limit": NODES})
    if found.x is None and found.status != INFEASIBLE:
        found = milp(flat / span, **programme, options={"mip_rel_gap": GAP})
    if found.x is None:
        return None
    ends = np.cumsum(sizes)
    return [int(np.argmax(found.x[end - size : end])) for size, end in zip(sizes, ends, strict=True)]


def score_losses(scores: Scores, *, per_parameter: bool) -> Losses:
    """What variants lose by the scores of the units that leave, on the scale of the smallest one of the model.

    ``per_parameter`` is for scores on which units of unequal size compete as they are.
    """
    least = min([0.0, *(float(one.min()) for one in scores.values())])

    def losses(group: Group, ordered: Sequence[Bundle], counts: Sequence[int]) -> Numbers:
        weight = group.cost.params if per_parameter else 1
        each = np.array([(b.value - least) * len(b.units) * weight for b in ordered])
        gone = np.concatenate([np.cumsum(each[::-1])[::-1], [0.0]])
        return gone[np.asarray(counts)]

    return losses


def measured_losses(measured: Mapping[str, Mapping[int, float]]) -> Losses:
    """What variants lose, from measurements at some numbers of kept units by the name of the group.

    Keeping more never counts as losing more, and between the measurements lies a monotone curve.
    """
    from scipy.interpolate import PchipInterpolator

    def losses(group: Group, ordered: Sequence[Bundle], counts: Sequence[int]) -> Numbers:
        points = {**measured[group.name], group.units: 0.0}
        kept = np.array(sorted(points), dtype=np.float64)
        lost = np.maximum.accumulate([max(points[int(k)], 0.0) for k in kept[::-1]])[::-1]
        sizes = np.cumsum([0, *(len(b.units) for b in ordered)])[np.asarray(counts)]
        if len(kept) == 1:
            return np.zeros(len(sizes))
        return np.asarray(PchipInterpolator(kept, lost)(np.clip(sizes, kept[0], kept[-1])), dtype=np.float64)

    return losses


def _rounded_up(fraction: float) -> str:
    return f"{np.ceil(1000 * fraction - 1e-6) / 1000:.3f}"
