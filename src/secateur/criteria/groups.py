"""From scores of single parameters to scores of coupled groups: reductions and normalisers.

Source: SPA (arXiv:2403.18955) §4; the mean as normaliser also in DepGraph (arXiv:2301.12900) §3.3.
U units of a group, E entries of one unit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from secateur.criteria import lamp, standardise

REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda x_UE: x_UE.sum(dim=1),
    "mean": lambda x_UE: x_UE.mean(dim=1),
    "max": lambda x_UE: x_UE.amax(dim=1),
    "first": lambda x_UE: x_UE[:, 0],
}
"""Entries of every unit → one number per unit."""

_ALONG: dict[str, Callable[[Tensor, list[int]], Tensor]] = {
    "sum": lambda x, dims: x.sum(dim=dims, dtype=torch.float64),
    "mean": lambda x, dims: x.mean(dim=dims, dtype=torch.float64),
    "max": lambda x, dims: x.amax(dim=dims),
}
"""Reductions that may be taken dimension by dimension."""


def reduce_slices(scores: Tensor, dim: int, index_UW: Tensor, reduction: str) -> Tensor:
    """Scores of all entries of a parameter → [units] float64, for units that have ``index_UW`` along ``dim``.

    What a unit's slices hold is put together before they are looked up, where that is the same: nothing is copied then.
    """
    index_UW = index_UW.to(scores.device)
    if reduction not in _ALONG:
        return REDUCTIONS[reduction](scores.movedim(dim, 0)[index_UW].flatten(1).double())
    others = [d for d in range(scores.dim()) if d != dim % scores.dim()]
    along = _ALONG[reduction](scores, others) if others else scores
    return REDUCTIONS[reduction](along.double()[index_UW])


def mean_of_places(places: Sequence[tuple[Tensor, Sequence[Tensor]]], of_unit: Callable[[Tensor], Tensor]) -> Tensor:
    """One number per unit, from where its channels are seen, [units] float64.

    A place has a value for every channel, [channels], and the channels of every unit, int64, which ``of_unit`` puts
    together. Places in which a unit has no channels don't count for it; a unit that is nowhere gets 0.
    """
    found_PU = torch.stack(
        [torch.stack([of_unit(v_C[c]) if len(c) else v_C.new_zeros(()) for c in units]) for v_C, units in places]
    )
    there_PU = torch.tensor([[len(c) > 0 for c in units] for _, units in places], device=found_PU.device)
    return (found_PU.double() * there_PU).sum(dim=0) / there_PU.sum(dim=0).clamp(min=1)


def _divided(scores_U: Tensor, by: Tensor) -> Tensor:
    """Scores relative to ``by``; a group in which all is zero stays zero."""
    return scores_U / by if float(by) != 0 else scores_U


NORMALIZERS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda s_U: s_U,
    "mean": lambda s_U: _divided(s_U, s_U.mean().abs()),
    "max": lambda s_U: _divided(s_U, s_U.abs().max()),
    "sum": lambda s_U: _divided(s_U, s_U.sum().abs()),
    "standardise": standardise,
    # for scores that are squares, such as those of depgraph_l2
    "lamp": lamp,
}
"""Scores of one group → scores that compete with those of other groups."""
