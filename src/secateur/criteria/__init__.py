"""Scores: pure functions of tensors, one number per unit or weight, higher = keep.

O outputs and I inputs of a weight, U units of a group, W columns of one unit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

Criterion = Callable[..., Tensor]
"""(weight or unit, statistics) → score; the law: permuting the units permutes the scores and nothing else."""


def weighted_magnitude(w_OI: Tensor, square_sum_I: Tensor) -> Tensor:
    """|W_ij| * sqrt(a_j), [outputs, inputs] (Wanda); ``square_sum_I`` is a_j, the squared norm of input j."""
    return w_OI.abs() * square_sum_I.sqrt().to(w_OI.dtype)


def column_energy(w_OI: Tensor) -> Tensor:
    """Sum over outputs of W_ij^2, [inputs] float64."""
    return w_OI.double().square().sum(dim=0)


def standardise(scores: Tensor) -> Tensor:
    """(s - mean) / std over all entries, unbiased std, float64; constant scores give zeros, never NaN."""
    s = scores.double()
    std = s.std() if s.numel() > 1 else torch.zeros((), dtype=torch.float64)
    # a spread of rounding noise is no spread, and what is noise goes by the scores: squares of small ones are tiny
    if float(std) <= 1e-12 * float(s.abs().max()):
        return torch.zeros_like(s)
    return (s - s.mean()) / std


def lamp(squares: Tensor) -> Tensor:
    """Every entry divided by the sum of those that are at least as large, its own included; [entries] float64.

    ``squares`` [entries] are not negative; among equals the later ones count as larger. Zeros stay zeros. Source:
    LAMP, arXiv:2010.07611, eq. 3.
    """
    ordered, order = squares.double().sort(stable=True)
    above = ordered.flip(0).cumsum(0).flip(0)
    return torch.empty_like(ordered).scatter_(0, order, ordered / above.clamp_min(1e-300))


def per_unit(channel_scores_I: Tensor, columns_UW: Tensor, reduce: str) -> Tensor:
    """Channel scores gathered into units, [units]; ``reduce`` is ``sum`` or ``mean`` over a unit's columns."""
    gathered = channel_scores_I[columns_UW.to(channel_scores_I.device)]
    return gathered.sum(dim=1) if reduce == "sum" else gathered.mean(dim=1)


def random_scores(name: str, seed: int, shape: tuple[int, ...]) -> Tensor:
    """Uniform scores in [0, 1) float32, the same for the same (name, seed) whatever else was drawn before."""
    return torch.rand(shape, generator=named_generator(name, seed))


def named_generator(name: str, seed: int) -> torch.Generator:
    """A generator on the CPU that depends on (name, seed) alone."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
