"""Scores of single weights before training, higher = keep; shaped like the weight, in its dtype."""

from __future__ import annotations

from torch import Tensor


def snip(weight: Tensor, gradient: Tensor) -> Tensor:
    """|w * dL/dw|, the sensitivity of the loss to a connection (N. Lee et al., ICLR 2019, arXiv:1810.02340, eq. 4).

    Not divided by the sum over all weights, which changes no order.
    """
    return (weight * gradient).abs()


def grasp(weight: Tensor, curvature: Tensor) -> Tensor:
    """w * (H dL/dw): without the lowest ones the gradient flows best (C. Wang et al., ICLR 2020, arXiv:2002.07376).

    ``curvature`` is the product of the Hessian with the gradient. The paper's score is the negative, and it removes
    the highest.
    """
    return weight * curvature
