"""Layer densities: which fraction of its weights each layer keeps when the whole network keeps a given share.

L layers; n_l weights and f_l multiply-accumulates of layer l; p_l the fraction of its weights that stays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from secateur.allocate.masks import kth_smallest
from secateur.errors import BudgetError, NonFiniteError
from secateur.finite import all_finite

Densities = NDArray[np.float64]
WeightScores = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
"""Masks of weights (True = kept) by name → scores of the weights of the masked network, by name, higher = keep."""


def synexp(
    weights: Sequence[int],
    macs: Sequence[int],
    *,
    max_weights: float | None = None,
    max_macs: float | None = None,
    cap: float | None = 1.0,
) -> Densities:
    """Densities [layers] float64 that maximise the expected synaptic flow within the budgets.

        max sum_l log p_l   s.t.   sum_l n_l p_l <= max_weights,  sum_l f_l p_l <= max_macs,  p_l <= cap
        p_l = min(cap, 1 / (lambda n_l + mu f_l))                                     (its stationary point)

    With one budget this is water-filling: every layer below the cap keeps the same number of weights. Budgets are
    absolute, None is no budget; ``cap=None`` lets layers grow. Raises BudgetError when a budget leaves less than one
    weight per layer, or less than what that costs in MACs, and when there is neither a budget nor a cap.
    Source: Y. Cai et al., arXiv:2203.02549, the SynExp objective.
    """
    n, f = np.asarray(weights, dtype=np.float64), np.asarray(macs, dtype=np.float64)
    _check_feasible("weights", max_weights, np.ones_like(n))
    _check_feasible("MACs", max_macs, f / n)
    if cap is None and max_weights is None and max_macs is None:
        raise BudgetError("densities without a cap need a budget of weights or of MACs")
    top = np.inf if cap is None else cap

    def densities(per_weight: float, per_mac: float) -> Densities:
        with np.errstate(divide="ignore"):
            return np.minimum(top, 1 / (per_weight * n + per_mac * f))

    def price_of_weights(per_mac: float) -> float:
        # at L / budget every layer keeps at most budget / L weights
        return _smallest(lambda price: (n * densities(price, per_mac)).sum(), max_weights, len(n))

    def price_of_macs() -> float:
        return _smallest(lambda price: (f * densities(price_of_weights(price), price)).sum(), max_macs, len(n))

    per_mac = price_of_macs()
    return densities(price_of_weights(per_mac), per_mac)


def _check_feasible(what: str, budget: float | None, least: Densities) -> None:
    if budget is not None and not budget >= least.sum():
        raise BudgetError(
            f"a budget of {budget:,.0f} {what} is too small: one weight in each of {len(least)} layers takes"
            f" {least.sum():,.0f}"
        )


def _smallest(used: Callable[[float], float], budget: float | None, layers: int) -> float:
    """The smallest price, exact to one floating-point number, at which no more than the budget is used."""
    if budget is None or used(0.0) <= budget:
        return 0.0
    low, high = 0.0, layers / budget
    while low < (middle := (low + high) / 2) < high:
        low, high = (low, middle) if used(middle) <= budget else (middle, high)
    return high


def erk(shapes: Sequence[Sequence[int]], density: float, power: float = 1.0) -> Densities:
    """Densities [layers] float64 of Erdos-Renyi-Kernel: p_l = eps * (sum of the sizes / product of the sizes)^power.

    eps is such that ``density`` of all weights stays. Where some p_l would exceed 1, the layers with the largest ones
    stay dense and eps is found again for the others. Source: U. Evci et al., "Rigging the Lottery", ICML 2020,
    arXiv:1911.11134, §3; official code google-research/rigl. Differs from it: densities aren't rounded to counts.
    """
    counts = np.array([np.prod(shape) for shape in shapes], dtype=np.float64)
    raw = np.array([(sum(shape) / np.prod(shape)) ** power for shape in shapes], dtype=np.float64)
    dense = np.zeros(len(shapes), dtype=bool)
    while not dense.all():
        left = density * counts.sum() - counts[dense].sum()
        eps = left / (raw * counts)[~dense].sum()
        largest = raw[~dense].max()
        if eps * largest <= 1:
            return np.where(dense, 1.0, eps * raw)
        dense |= raw == largest
    return np.ones(len(shapes))


def uniform(shapes: Sequence[Sequence[int]], density: float) -> Densities:
    """The same density in every layer, [layers] float64."""
    return np.full(len(shapes), density)


def global_masks(
    scores: WeightScores, shapes: Mapping[str, Sequence[int]], density: float, rounds: int = 1
) -> dict[str, Tensor]:
    """Masks [shape] bool of the weights with the highest scores of all layers; exactly round(density * N) stay.

    Round k of ``rounds`` keeps density^(k/rounds) and scores what is left once more, as SynFlow does (H. Tanaka et
    al., NeurIPS 2020, arXiv:2006.05467, algorithm 1). Chosen by index, so that ties don't remove more than was asked.
    Raises NonFiniteError.
    """
    masks = {name: torch.ones(tuple(shape), dtype=torch.bool) for name, shape in shapes.items()}
    total = sum(mask.numel() for mask in masks.values())
    for step in range(1, rounds + 1):
        found = scores(masks)
        flat = torch.cat([found[name].detach().double().cpu().flatten() for name in masks])
        if not all_finite(flat):
            raise NonFiniteError("scores of weights hold NaN or inf: look at the weights, the data and the loss")
        # what has left stays away, also where all that is left scores no higher
        flat[~torch.cat([mask.flatten() for mask in masks.values()])] = -torch.inf
        parts = highest(flat, round(density ** (step / rounds) * total)).split(
            [mask.numel() for mask in masks.values()]
        )
        masks = {name: part.reshape(mask.shape) for (name, mask), part in zip(masks.items(), parts, strict=True)}
    return masks


def highest(flat: Tensor, count: int) -> Tensor:
    """True for the ``count`` highest entries of a vector; among equals the first ones."""
    if count <= 0:
        return torch.zeros_like(flat, dtype=torch.bool)
    if count >= len(flat):
        return torch.ones_like(flat, dtype=torch.bool)
    # a partition is several times faster than a sort, and there may be many rounds
    least = kth_smallest(flat, len(flat) - count)
    kept, equal = flat > least, flat == least
    return kept | (equal & (equal.cumsum(dim=0) <= count - kept.sum()))


def of_masks(masks: Mapping[str, Tensor]) -> Densities:
    """The density of every mask, [layers] float64. Raises BudgetError when nothing of a layer stays."""
    empty = [name for name, mask in masks.items() if not bool(mask.any())]
    if empty:
        raise BudgetError(
            f"no weight of {empty[0]} would stay at this sparsity, so its layer has no width: take a smaller one, or"
            " densities that never empty a layer (synexp, synflow)"
        )
    return np.array([float(mask.double().mean()) for mask in masks.values()])
