"""How a budget is spread over groups of units.

All rounding lives here: multiples, minima and the balance of query heads over key-value groups. Units are first
tied into bundles that must leave together; a group keeps the best bundles, so what it keeps for a larger budget
always contains what it keeps for a smaller one.

Laws: the budget is met within one bundle; nothing is kept less for a smaller sparsity; sparsity 0 keeps everything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from secateur.allocate.shares import part_of
from secateur.errors import BudgetError
from secateur.structure import Cost, Group

# kinds of units of which a rounded number is kept
ROUNDED = ("neuron", "channel")

Scores = Mapping[str, Tensor]
Kept = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What every allocator must respect: the unit of the budget, the smallest group, the multiple of neurons."""

    budget: str = "params"
    min_keep: int = 1
    round_to: int = 1

    def cost(self, cost: Cost) -> int:
        """The cost of something in the unit of the budget; 1 where that is no sum of costs (channels, latency)."""
        return int(getattr(cost, self.budget, 1))


class Allocator(Protocol):
    """(scores of groups, the groups, the cost of everything the sparsity counts) → kept units of every group.

    Raises BudgetError when the budget can't be met with the minimum kept.
    """

    def allocate(self, scores: Scores, groups: Sequence[Group], total: int, limits: Limits) -> Kept: ...


@dataclass(frozen=True)
class Bundle:
    """Units that leave together: their mean score, and their cost in the unit of the budget."""

    group: str
    units: Tensor
    value: float
    cost: int


def bundles(group: Group, scores_U: Tensor, limits: Limits) -> list[Bundle]:
    """The units of a group in bundles, best first.

    A bundle holds ``round_to`` neurons or channels, or one query head of every key-value group; a remainder that
    doesn't fill a bundle is the worst one.
    """
    if group.balance > 1:
        parts_PU = scores_U.reshape(group.balance, -1)
        order = parts_PU.argsort(dim=1, descending=True, stable=True)
        units = order + torch.arange(group.balance)[:, None] * parts_PU.shape[1]
        chunks = list(units.T)
    else:
        order = scores_U.argsort(descending=True, stable=True)
        chunks = list(order.split(limits.round_to if group.kind in ROUNDED else 1))
    each = limits.cost(group.cost)
    if len(chunks) == len(scores_U):  # one by one, without a mean of each
        values = scores_U[torch.cat(chunks)].double().tolist() if chunks else []
    else:
        values = [float(scores_U[c].double().mean()) for c in chunks]
    return [Bundle(group.name, c, value, each * len(c)) for c, value in zip(chunks, values, strict=True)]


def kept_units(chosen: Sequence[Bundle], groups: Sequence[Group]) -> Kept:
    """Units of the chosen bundles by group, ascending."""
    kept: dict[str, list[Tensor]] = {g.name: [] for g in groups}
    for bundle in chosen:
        kept[bundle.group].append(bundle.units)
    empty = torch.zeros(0, dtype=torch.int64)
    return {name: torch.cat(parts).sort().values if parts else empty for name, parts in kept.items()}


def least_bundles(group: Group, ordered: Sequence[Bundle], limits: Limits) -> int:
    """Number of bundles that hold at least ``min_keep`` units (per key-value group, for query heads)."""
    needed, held = limits.min_keep * group.balance, 0
    for count, bundle in enumerate(ordered, start=1):
        held += len(bundle.units)
        if held >= needed:
            return count
    return len(ordered)


def layer_part(groups: Sequence[Group], layer: int, limits: Limits) -> tuple[int, int]:
    """(what the units of a layer cost, what those of all layers do)."""
    costs = [(group.layer, group.units * limits.cost(group.cost)) for group in groups]
    return sum(cost for place, cost in costs if place == layer), sum(cost for _, cost in costs)


def largest_share(groups: Sequence[Group], limits: Limits) -> float:
    """The fraction of what these groups cost that can leave at most."""
    kept = whole = 0
    for group in groups:
        ordered = bundles(group, torch.zeros(group.units), limits)
        kept += sum(bundle.cost for bundle in ordered[: least_bundles(group, ordered, limits)])
        whole += sum(bundle.cost for bundle in ordered)
    return 1 - kept / whole if whole else 0.0


def refusal(asked: float, removable: float, total: int, limits: Limits) -> BudgetError:
    """The error of a budget that can't be met."""
    most = removable / total if total else 0.0
    return BudgetError(
        f"can't remove {asked:.1%} of the {limits.budget}: with at least {limits.min_keep} unit(s) kept in every group"
        f" at most {most:.1%} can go"
    )


@dataclass(frozen=True)
class GlobalAllocator:
    """All groups compete on one scale of scores; the best units stay until the kept cost is nearest to the budget.

    ``strict`` also drops the unit at which the published code stops, which undershoots by that unit.
    """

    sparsity: float
    strict: bool = False

    def allocate(self, scores: Scores, groups: Sequence[Group], total: int, limits: Limits) -> Kept:
        forced, free = [], []
        for group in groups:
            ordered = bundles(group, scores[group.name], limits)
            least = least_bundles(group, ordered, limits)
            forced += ordered[:least]
            free += ordered[least:]
        free.sort(key=lambda b: -b.value)
        cuttable = sum(b.cost for b in forced + free)
        target = cuttable - self.sparsity * total
        base = sum(b.cost for b in forced)
        removable = cuttable - base
        if self.sparsity * total > removable + max((b.cost for b in free), default=0) / 2:
            raise refusal(self.sparsity, removable, total, limits)
        count = _nearest(base, [b.cost for b in free], target)
        if self.strict and self.sparsity > 0:
            count = max(0, count - 1)
        return kept_units(forced + free[:count], groups)


def _nearest(base: int, costs: Sequence[int], target: float) -> int:
    """How many of ``costs`` to add to ``base`` to come nearest to ``target``; the smaller number when tied."""
    sums = torch.tensor([base, *costs], dtype=torch.float64).cumsum(0)
    return int((sums - target).abs().argmin())


def _fitting(base: int, costs: Sequence[int], target: float) -> int:
    """How many of ``costs`` can be added to ``base`` without going beyond ``target``, which is no exact number."""
    return max(0, sum(total <= target * (1 + 1e-9) for total in accumulate(costs, initial=base)) - 1)


@dataclass(frozen=True)
class UniformAllocator:
    """Every layer loses the same share of its cost.

    Each group loses floor(share * units). With ``fill`` the rest of the layer's budget, which coarse units such as
    key-value heads leave over, comes out of the group with the smallest units; without, it stays (the published
    rule, which removes nothing from three heads at 20 %); with ``at_least`` that group keeps what fits into the budget,
    as int((1 - share) * units) does, in place of what comes nearest. ``shares`` are the sparsities of layers that lose
    another share.
    """

    sparsity: float
    fill: bool = True
    at_least: bool = field(default=False, kw_only=True)
    shares: Mapping[int, float] = field(default_factory=dict, kw_only=True)

    def allocate(self, scores: Scores, groups: Sequence[Group], total: int, limits: Limits) -> Kept:
        layers: dict[int, list[Group]] = {}
        for group in groups:
            layers.setdefault(group.layer, []).append(group)
        chosen: list[Bundle] = []
        for layer, members in layers.items():
            own, whole = layer_part(groups, layer, limits)
            alike = replace(self, sparsity=self.shares.get(layer, self.sparsity))
            # exact for integers, so that equal layers get what an equal division gives
            chosen += alike._layer(scores, members, total * own / whole, limits)
        return kept_units(chosen, groups)

    def _layer(self, scores: Scores, groups: Sequence[Group], share: float, limits: Limits) -> list[Bundle]:
        ordered = {g.name: bundles(g, scores[g.name], limits) for g in groups}
        least = {g.name: least_bundles(g, ordered[g.name], limits) for g in groups}
        finest = min(groups, key=lambda g: limits.cost(g.cost)).name
        keep = self._counts(ordered, least, finest)
        if self.fill and self.sparsity > 0:
            self._meet(finest, ordered, least, keep, share, limits)
        return [b for n, many in ordered.items() for b in many[: keep[n]]]

    def _counts(self, ordered: Mapping[str, list[Bundle]], least: Mapping[str, int], finest: str) -> dict[str, int]:
        """How many bundles every group keeps."""
        return {n: max(least[n], len(b) - part_of(len(b), self.sparsity)) for n, b in ordered.items()}

    def _meet(
        self,
        finest: str,
        ordered: Mapping[str, list[Bundle]],
        least: Mapping[str, int],
        keep: dict[str, int],
        share: float,
        limits: Limits,
    ) -> None:
        """Bring one layer to its share by neurons; where those don't suffice a coarse group gives one unit more."""
        coarse = [n for n in keep if n != finest]
        costs = [b.cost for b in ordered[finest]]
        forced, free = costs[: least[finest]], costs[least[finest] :]
        while True:
            others = sum(b.cost for n in coarse for b in ordered[n][keep[n] :])
            wanted = self.sparsity * share - others
            spare = [n for n in coarse if keep[n] > least[n]]
            step = max(free or [ordered[n][-1].cost for n in spare], default=0)
            # a little more, as the share is no exact number
            if wanted <= sum(free) + step / 2 + 1e-9 * share:
                count = _fitting if self.at_least else _nearest
                keep[finest] = len(forced) + count(sum(forced), free, sum(costs) - wanted)
                return
            if not spare:
                raise refusal(self.sparsity, others + sum(free), int(share), limits)
            keep[max(spare, key=lambda n: keep[n] - least[n])] -= 1


@dataclass(frozen=True)
class RoundedAllocator(UniformAllocator):
    """Every layer loses the same share of its cost; shares of coarse units are rounded to the nearest, not down.

    Without ``fill`` a head, or a part of one, that rounding keeps is made up for by as many neurons, whatever they cost
    (AMP's published rule).
    """

    def _counts(self, ordered: Mapping[str, list[Bundle]], least: Mapping[str, int], finest: str) -> dict[str, int]:
        gone = {n: min(round(len(b) * self.sparsity), len(b) - least[n]) for n, b in ordered.items()}
        if not self.fill:
            others = [(b, gone[n]) for n, b in ordered.items() if n != finest]
            short = sum((len(b) * self.sparsity - count) * len(b[0].units) for b, count in others)
            many = ordered[finest]
            wanted = round(len(many) * self.sparsity + short / len(many[0].units))
            gone[finest] = max(0, min(wanted, len(many) - least[finest]))
        return {n: len(b) - gone[n] for n, b in ordered.items()}


@dataclass(frozen=True)
class ManualAllocator:
    """A given number of attention units leaves the model; neurons give the rest of the budget (FLAP's *M modes).

    ``scope`` is ``layer`` (the same number in every layer, and the same share of its cost) or ``global`` (heads and
    neurons ranked apart).
    """

    sparsity: float
    remove_heads: int
    scope: str

    def allocate(self, scores: Scores, groups: Sequence[Group], total: int, limits: Limits) -> Kept:
        if not any(group.kind == "neuron" for group in groups):
            raise BudgetError(
                "the model has no neurons to give what a number of heads leaves of the budget: take another structure"
            )
        parts: dict[int, list[Group]] = {}
        for group in groups:
            parts.setdefault(group.layer if self.scope == "layer" else 0, []).append(group)
        whole = sum(g.units * limits.cost(g.cost) for g in groups)
        chosen: list[Bundle] = []
        for members in parts.values():
            own = sum(g.units * limits.cost(g.cost) for g in members)
            # exact for integers, so that equal layers get what an equal division gives
            chosen += self._part(scores, members, total * own / whole, self.remove_heads // len(parts), limits)
        return kept_units(chosen, groups)

    def _part(self, scores: Scores, groups: Sequence[Group], share: float, heads: int, limits: Limits) -> list[Bundle]:
        """What stays of groups of which ``heads`` attention units leave, and neurons for the rest of their share."""
        neurons = [g for g in groups if g.kind == "neuron"]
        others = [g for g in groups if g.kind != "neuron"]
        count = 0
        if neurons:
            spent = heads * max((limits.cost(g.cost) for g in others), default=0)
            count = int((self.sparsity * share - spent) / min(limits.cost(g.cost) for g in neurons))
        if count < 0:
            raise BudgetError(
                f"removing {self.remove_heads} heads takes more than {self.sparsity:.1%}: lower remove_heads"
            )
        pools = [(others, heads), (neurons, count)]
        return [b for pool, removed in pools if pool for b in self._pool(scores, pool, removed, limits)]

    def _pool(self, scores: Scores, groups: Sequence[Group], remove: int, limits: Limits) -> list[Bundle]:
        forced, free = [], []
        for group in groups:
            ordered = bundles(group, scores[group.name], limits)
            least = least_bundles(group, ordered, limits)
            forced += ordered[:least]
            free += ordered[least:]
        free.sort(key=lambda b: -b.value)
        left = remove
        while left > 0 and free:
            left -= len(free.pop().units)
        if left > 0:
            raise BudgetError(
                f"can't remove {remove} {groups[0].kind} units with {limits.min_keep} kept in every group"
            )
        return forced + free
