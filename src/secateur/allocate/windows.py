"""A window of layers that are cut, and layers around it that stay whole; counts as published code makes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from secateur.allocate.units import (
    Allocator,
    Bundle,
    GlobalAllocator,
    Kept,
    Limits,
    Scores,
    bundles,
    kept_units,
    least_bundles,
    refusal,
)
from secateur.errors import BudgetError
from secateur.structure import Group


@dataclass(frozen=True)
class Window:
    """The layers that are cut: all but the first and the last, as many as these say of the number of layers."""

    first: Callable[[int], int]
    last: Callable[[int], int]

    def holds(self, layer: int, layers: int) -> bool:
        """Whether a layer, of so many in all, is cut."""
        return self.first(layers) <= layer < layers - self.last(layers)


@dataclass(frozen=True)
class WindowAllocator:
    """Only layers within a window are cut, by so much that ``sparsity`` of the whole leaves.

    ``within`` gives the allocator of these layers, for the share of them that leaves; ``ratio`` is that share where it
    is not 0. ``heads`` and ``neurons`` have windows of their own.
    """

    sparsity: float
    heads: Window
    neurons: Window
    within: Callable[[float], Allocator]
    ratio: float = 0.0

    def allocate(self, scores: Scores, groups: Sequence[Group], total: int, limits: Limits) -> Kept:
        """See ``Allocator``."""
        inside = self.inside(groups)
        kept: Kept = {g.name: torch.arange(g.units) for g in groups}
        most = sum(g.units * limits.cost(g.cost) for g in inside)
        share = self.ratio or self.sparsity * total / max(most, 1)
        if share >= 1:
            raise refusal(self.sparsity, most, total, limits)
        if share > 0:
            kept |= self.within(share).allocate({g.name: scores[g.name] for g in inside}, inside, most, limits)
        return kept

    def inside(self, groups: Sequence[Group]) -> list[Group]:
        """The groups that are cut."""
        layers = 1 + max(g.layer for g in groups)
        windows = {g.name: self.neurons if g.kind == "neuron" else self.heads for g in groups}
        return [g for g in groups if windows[g.name].holds(g.layer, layers)]

    def weights(self, groups: Sequence[Group]) -> float:
        """How many weights ``ratio`` takes from these groups."""
        return self.ratio * sum(group.units * group.cost.params for group in self.inside(groups))


def leaving(channels: int, ratio: float) -> int:
    """How many channels leave when int(channels (1 - ratio)) stay, as LLM-Pruner counts."""
    return channels - int(channels * (1 - ratio))


@dataclass(frozen=True)
class CountedAllocator:
    """Every group loses as many whole units as ``leaving`` says of its channels, whatever they cost."""

    ratio: float

    def allocate(self, scores: Scores, groups: Sequence[Group], total: int, limits: Limits) -> Kept:
        """See ``Allocator``. Raises BudgetError for a ratio that takes too many units of a group."""
        chosen: list[Bundle] = []
        for group in groups:
            ordered = bundles(group, scores[group.name], limits)
            width = group.columns.shape[1] // group.parts
            gone = leaving(group.units * width, self.ratio) // width // len(ordered[0].units)
            least = least_bundles(group, ordered, limits)
            if gone and len(ordered) - gone < least:
                raise BudgetError(
                    f"{group.name}: {self.ratio:.1%} take {gone} of {len(ordered)}, and {least} must stay: lower the"
                    " ratio, or let the rest come from the neurons (fill=true)"
                )
            chosen += ordered[: len(ordered) - gone]
        return kept_units(chosen, groups)


@dataclass(frozen=True)
class RankedAllocator:
    """All units of all groups are ranked together, and as many leave as ``leaving`` says, whatever they cost."""

    ratio: float

    def allocate(self, scores: Scores, groups: Sequence[Group], total: int, limits: Limits) -> Kept:
        """See ``Allocator``."""
        units = sum(g.units for g in groups)
        alike = replace(limits, budget="units")
        return GlobalAllocator(leaving(units, self.ratio) / units).allocate(scores, groups, units, alike)
