"""Damped Hessians: what is added to a diagonal until a matrix can be factorised, and never another matrix instead.

I inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from secateur.errors import NonFiniteError
from secateur.finite import all_finite

_LADDER = (1.0, 10.0, 100.0, 1000.0)


def inverse_factor(h_II: Tensor, damping: float = 0.01) -> tuple[Tensor, float]:
    """(U, damping used): the upper Cholesky factor of the inverse of the damped Hessian, H^-1 = U^T U.

    ``damping`` is relative to the mean of the diagonal. When the factorisation fails the damping is raised tenfold,
    up to a thousandfold; never is another matrix used in its place. Inputs that were never active get a unit
    diagonal, which has no part in the mean. Raises NonFiniteError when even the last rung fails.
    """
    return _of_damped(h_II, damping, _upper_inverse_factor)


def inverse_hessian(h_II: Tensor, damping: float = 0.01) -> tuple[Tensor, float]:
    """(H^-1, damping used) of the damped Hessian, with the rules of ``inverse_factor``."""
    return _of_damped(h_II, damping, _inverse)


def _of_damped(h_II: Tensor, damping: float, solve: Callable[[Tensor], Tensor | None]) -> tuple[Tensor, float]:
    _check_finite(h_II)
    given_I = h_II.diagonal().clone()
    live_I = torch.where(given_I == 0, 1.0, given_I)
    # the ones are no size of anything: next to quiet inputs they would be all of the mean
    mean = given_I.mean()
    # the caller's matrix for as long as it takes: these are what a run's memory peaks at, and a copy is one more
    try:
        for tried in rungs(damping):
            h_II.diagonal().copy_(live_I + tried * mean)
            found = solve(h_II)
            if found is not None:
                return found, tried
    finally:
        h_II.diagonal().copy_(given_I)
    raise singular(damping)


def with_live_diagonal(h_II: Tensor) -> Tensor:
    """A copy with a unit diagonal for inputs that were never active. Raises NonFiniteError for NaN or inf."""
    _check_finite(h_II)
    h_II = h_II.clone()
    diagonal = h_II.diagonal()
    diagonal[diagonal == 0] = 1.0
    return h_II


def _check_finite(h_II: Tensor) -> None:
    if not all_finite(h_II):
        raise NonFiniteError("the Hessian holds NaN or inf: the calibration activations overflow, try --dtype float32")


def rungs(damping: float) -> Iterator[float]:
    """What is tried one after the other: the damping that was asked for, then tenfold each time."""
    for rung in _LADDER:
        yield damping * rung if damping else (0.0 if rung == 1.0 else 1e-4 * rung)


def singular(damping: float) -> NonFiniteError:
    """The error when the last rung was not enough."""
    tried = list(rungs(damping))[-1]
    return NonFiniteError(f"the Hessian stays singular at a damping of {tried:g}: use more calibration data")


def damping_notes(name: str, asked: float, used: float) -> tuple[str, ...]:
    """What a plan says when more damping was used than was asked for."""
    return (f"{name}: damping raised to {used:g}",) if used > asked else ()


def _inverse(h_II: Tensor) -> Tensor | None:
    lower, failed = torch.linalg.cholesky_ex(h_II)
    if int(failed):
        return None
    inverse = torch.cholesky_inverse(lower)
    return inverse if all_finite(inverse) else None


def _upper_inverse_factor(h_II: Tensor) -> Tensor | None:
    inverse = _inverse(h_II)
    if inverse is None:
        return None
    upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
    return upper if not int(failed) and all_finite(upper) else None
