"""From layer densities to widths: what share of its channels every coupled group keeps.

L layers, G groups. A layer whose dimensions lie along groups a and b keeps r_a * r_b of its weights when the groups
keep shares r_a and r_b of their channels; in logarithms this is linear, with one exponent per layer and group.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from secateur.allocate.densities import Densities

Shares = NDArray[np.float64]


def fit_shares(
    exponents_LG: NDArray[np.float64], densities_L: Densities, weights_L: Densities | None = None, cap: float = 1.0
) -> Shares:
    """The share [groups] float64 of its channels that each group keeps, in (0, cap], by least squares.

        min_r sum_l w_l (sum_g e_lg log r_g - log p_l)^2,   then r_g <= cap

    A dimension that doesn't get narrower has no group and counts as 1. Where the layers leave a choice, the r_g are
    taken that change widths the least. ``weights_L`` are w_l, 1 by default.
    """
    root = np.sqrt(np.ones_like(densities_L) if weights_L is None else weights_L)
    logs = np.linalg.lstsq(exponents_LG * root[:, None], np.log(densities_L) * root, rcond=None)[0]
    return np.exp(np.minimum(logs, np.log(cap)))


def crop_scores(units: int, share: float, dense: int | None = None) -> Tensor:
    """Scores [units] float64 of channels in their order, such that one threshold scales the widths of all groups.

    Channel k, counted from 0, of a group of ``dense`` channels (by default ``units``) stays at the multiplier s when
    k + 1/2 <= s * share * dense, that is, when the width s * share * dense, rounded, is larger than k.
    """
    return share * (dense or units) / (torch.arange(units, dtype=torch.float64) + 0.5)
