"""What two plans have in common: the weights of the blocks that both remove over those that either does.

Removed units and blocks take all their weights with them, so that plans of any two kinds can be held against each
other. Rotated hidden states are the exception: what leaves there are directions of a basis, not weights of the dense
model. Weights of one matrix are looked at at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from secateur.plans import Plan
from secateur.structure import Anatomy, Matrix
from secateur.structure.surgery import removed_positions

# a float32 counts up to here without a gap
_EXACT = 1 << 24


class _Removed(NamedTuple):
    """What one plan removes, by tensor: positions along a dimension, whole blocks, and entries by the plan's masks."""

    plan: Plan
    positions: Mapping[tuple[str, int], Tensor]
    layers: frozenset[int]

    def entries(self, matrix: Matrix) -> Tensor:
        """True where a weight leaves, of the shape in which it is stored."""
        shape = matrix.shape[::-1] if matrix.transposed else matrix.shape
        if matrix.layer in self.layers:
            return torch.ones(shape, dtype=torch.bool)
        masked = matrix.tensor in self.plan.masks
        gone = ~self.plan.masks[matrix.tensor] if masked else torch.zeros(shape, dtype=torch.bool)
        for dim in range(2):
            positions = self.positions.get((matrix.tensor, dim))
            if positions is not None:
                gone = gone.index_fill(dim, positions, True)
        return gone


def jaccard(plans: Mapping[str, Plan], anatomy: Callable[[str], Anatomy]) -> list[list[float | None]]:
    """For every pair of plans, in their order, what both remove over what either removes.

    None where that is nothing, and in pairs with a plan that rotates. ``anatomy`` gives that of the dense model by the
    unit of attention, ``kv`` or ``query``.
    """
    removed = [_removed(plan, anatomy(plan.head_unit)) for plan in plans.values()]
    count = len(removed)
    both_PP = torch.zeros(count, count, dtype=torch.float64)
    for matrix in anatomy("kv").matrices:
        gone_PE = torch.stack([one.entries(matrix).flatten() for one in removed])
        for part_PE in gone_PE.split(_EXACT, dim=1):
            part_PE = part_PE.float()
            both_PP += (part_PE @ part_PE.T).double()
    rotates_P = torch.tensor([bool(plan.rotations) for plan in plans.values()])
    both_PP[rotates_P[:, None] | rotates_P] = torch.nan
    size_P = both_PP.diagonal()
    either_PP = size_P[:, None] + size_P[None] - both_PP
    pairs = [zip(*rows, strict=True) for rows in zip(both_PP.tolist(), either_PP.tolist(), strict=True)]
    return [[both / either if either > 0 else None for both, either in row] for row in pairs]


def _removed(plan: Plan, anatomy: Anatomy) -> _Removed:
    units = {name: plan.removed(name) for name in plan.keep}
    positions = removed_positions([anatomy[name] for name in units], units)
    return _Removed(plan, positions, frozenset(units["layers"].tolist()) if "layers" in units else frozenset())
