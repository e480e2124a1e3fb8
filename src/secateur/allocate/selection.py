"""Masks of many weights at once, by score: how many of each stay, and which.

Laws: never more than the asked fraction leaves (what rounds, rounds up what stays); masks for a larger sparsity of the
same scores are part of those for a smaller one; among equals the first entries stay.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from secateur.allocate.densities import erk, highest

SCOPES = ("uniform", "global", "erk")
"""Every weight loses the same fraction, all compete, or each keeps what Erdos-Renyi-Kernel gives it."""

Shapes = Mapping[str, Sequence[int]]


def fewest_kept(count: int, sparsity: float) -> int:
    """How many of ``count`` entries stay when ``sparsity`` of them may leave."""
    # what is an integer but for rounding is that integer
    return min(count, math.ceil(count * (1.0 - sparsity) - 1e-6))


def kept_counts(shapes: Shapes, sparsity: float, scope: str) -> dict[str, int]:
    """How many entries of each weight stay, for ``uniform`` and ``erk``; with ``erk`` the sum is that of the whole."""
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    if scope == "uniform":
        return {name: fewest_kept(size, sparsity) for name, size in sizes.items()}
    densities = erk(list(shapes.values()), 1.0 - sparsity)
    wished = densities * np.array(list(sizes.values()))
    counts = np.floor(wished + 1e-6).astype(np.int64)
    # the largest remainders make up the sum
    left = fewest_kept(sum(sizes.values()), sparsity) - int(counts.sum())
    order = np.argsort(-(wished - counts), kind="stable")
    counts[order[:left]] += 1
    return dict(zip(sizes, counts.tolist(), strict=True))


def keep_highest(
    scores: Mapping[str, Tensor], sparsity: float, *, scope: str = "uniform", floor: float = 0.0
) -> dict[str, Tensor]:
    """Masks of the entries with the highest scores, True = kept; a score of -inf never stays.

    ``scores`` are floating-point of any shape, on any device; every one keeps at least the fraction ``floor`` of its
    entries (of those that may stay) whatever the others have.
    """
    shapes = {name: tuple(score.shape) for name, score in scores.items()}
    flat = {name: score.detach().reshape(-1) for name, score in scores.items()}
    least = {name: fewest_kept(len(score), 1.0 - floor) for name, score in flat.items()}
    if scope == "global":
        found = _globally(flat, fewest_kept(sum(map(len, flat.values())), sparsity), least)
    else:
        counts = kept_counts(shapes, sparsity, scope)
        found = {name: highest_live(score, max(counts[name], least[name])) for name, score in flat.items()}
    return {name: mask.reshape(shapes[name]) for name, mask in found.items()}


def highest_live(flat: Tensor, count: int) -> Tensor:
    """True for the ``count`` highest entries, or for all that aren't -inf when those are fewer."""
    return highest(flat, count) & (flat != -torch.inf)


def _globally(flat: Mapping[str, Tensor], count: int, least: Mapping[str, int]) -> dict[str, Tensor]:
    reserved = {name: highest_live(score, least[name]) for name, score in flat.items()}
    # the flow through many layers leaves the range of float32
    together = torch.cat([score if score.dtype == torch.float64 else score.float() for score in flat.values()])
    first = torch.cat(list(reserved.values()))
    rest = together.masked_fill(first, -torch.inf)
    kept = first | highest_live(rest, max(count - int(first.sum()), 0))
    return dict(zip(flat, kept.split([len(score) for score in flat.values()]), strict=True))
