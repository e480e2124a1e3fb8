"""From scores of single weights to scores of units that several projections make up: rows, folded and grouped.

Source: LLM-Pruner (arXiv:2305.11627) §3.2. T projections, U units, E channels of one projection (a key-value head's;
one of a neuron), W channels of all query heads of a unit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

EXPANSIONS: dict[str, tuple[tuple[str, ...], Callable[..., Tensor]]] = {
    "param_first": (("gradient",), lambda w, g: w * g),
    "param_second": (("diagonal",), lambda w, f: w.square() * f),
    "param_mix": (("gradient", "diagonal"), lambda w, g, f: w * g - 0.5 * w.square() * f),
    "vectorize": (("gradient",), lambda w, g: w * g),
}
"""What the loss changes by without a weight, by Taylor expansion: what it takes beside w, and the formula."""

GROUPINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda x_TUE: x_TUE.sum(dim=0),
    "mean": lambda x_TUE: x_TUE.mean(dim=0),
    "max": lambda x_TUE: x_TUE.amax(dim=0),
    # relative to their means, or the product of small numbers would be none
    "prod": lambda x_TUE: (x_TUE / x_TUE.mean(dim=(1, 2), keepdim=True).clamp_min(1e-300)).prod(dim=0),
    "first": lambda x_TUE: x_TUE[0],
    "second": lambda x_TUE: x_TUE[-1],
}
"""How the projections of a unit are put together, [projections, units, channels] → [units, channels]."""


def summed_rows(scores: Tensor, dim: int, *, signed: bool) -> Tensor:
    """Sums of |scores| over every channel along ``dim``; ``signed``: the size of the sum. [channels] float64."""
    others = [d for d in range(scores.dim()) if d != dim]
    summed = scores if signed else scores.abs()
    return (summed.sum(dim=others, dtype=torch.float64) if others else summed.double()).abs()


def grouped(rows: Sequence[Tensor], grouping: str, *, strided: bool = False) -> Tensor:
    """One number a unit, [units], from ``rows``: [units, W or E] of every projection.

    Query heads are added up for the key-value head that they read; ``strided`` takes every one that many apart, as the
    official code does, instead of those side by side.
    """
    lanes = min(row_UW.shape[1] for row_UW in rows)
    return GROUPINGS[grouping](torch.stack([_folded(row_UW, lanes, strided) for row_UW in rows])).sum(dim=1)


def _folded(row_UW: Tensor, lanes: int, strided: bool) -> Tensor:
    """The query heads of a key-value head added up, [units, lanes]."""
    units, width = row_UW.shape
    if strided:
        return row_UW.reshape(width // lanes, units, lanes).sum(dim=0)
    return row_UW.reshape(units, width // lanes, lanes).sum(dim=1)
