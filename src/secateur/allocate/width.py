"""How many hidden channels stay, and which."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from secateur.allocate.shares import part_of
from secateur.allocate.units import Kept, Limits
from secateur.errors import BudgetError
from secateur.structure import Group


def kept_channels(group: Group, sparsity: float, round_to: int) -> int:
    """The nearest multiple of ``round_to``, or of the group's own where that is 0. Raises BudgetError."""
    wanted = group.units - part_of(group.units, sparsity)
    step = round_to or group.multiple
    kept = min(max(math.floor(wanted / step + 0.5), 1) * step, group.units)
    if wanted < group.units and kept == group.units:
        raise BudgetError(
            f"no hidden channel would leave: {wanted} of {group.units} should stay, and {kept} is the nearest multiple"
            f" of {step}; ask for more sparsity, or a smaller round_to"
        )
    return kept


def best_channels(scores: Tensor, kept: int) -> Tensor:
    """The channels with the highest ``scores``, of equal ones the first, ascending int64 [kept]."""
    return scores.argsort(stable=True, descending=True)[:kept].sort().values


@dataclass(frozen=True)
class WidthAllocator:
    """The same share of the hidden channels as of the matrices leaves, since each matrix has them along one side."""

    sparsity: float
    round_to: int = 0

    def allocate(self, scores: Mapping[str, Tensor], groups: Sequence[Group], total: int, limits: Limits) -> Kept:
        """See ``Allocator``."""
        return {g.name: best_channels(scores[g.name], kept_channels(g, self.sparsity, self.round_to)) for g in groups}
