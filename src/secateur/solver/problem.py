"""The one problem of second-order pruning: weights whose outputs come nearest to wanted ones.

    minimise over W  1/2 ||X W^T - Y||^2  =  sum(-W * G + W * (W H) / 2) + constant,     H = X^T X,  G = Y^T X

X are the inputs that the pruned network gives, Y the outputs that are wanted. For Y = X W0^T, what the dense weight
makes of the same inputs, G = W0 H. With the inputs X0 of the dense network, Y = X0 W0^T and G = W0 (X^T X0)^T: then
W also repairs what was lost before it. Where E is wanted on top, Y = X W0^T + E, G = W0 H + E^T X. H and G are sums
over tokens, so they merge over batches and ranks.

Everything is solved with inputs scaled so that H has a unit diagonal, which keeps float32 exact enough and makes
conjugate gradients quick. O outputs, I inputs.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from secateur.solver.damping import rungs, singular, with_live_diagonal

DAMPING_ON = ("inputs", "unit")


@dataclass(frozen=True)
class Curvature:
    """H of one input, damped and scaled, shared by all weights that read the input.

    ``h_II`` = (H + diag(ridge)) / (scale scale^T), float32 or float64. With damping on ``inputs`` the ridge is
    ``damping`` times the mean of the diagonal and ``h_II`` has a unit diagonal. With damping on ``unit`` it is
    ``damping`` times each entry of the diagonal, so that the diagonal is 1 + damping. Inputs that were never active
    have a diagonal of one before that, which has no part in the mean. ``damping`` is what was used.
    """

    h_II: Tensor
    scale_I: Tensor
    ridge_I: Tensor
    damping: float
    silent_I: Tensor
    """Inputs that were never active, bool."""
    _inverses: dict[float, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, gram_II: Tensor, damping: float = 0.01, on: str = "inputs") -> Curvature:
        """The damping is raised tenfold, up to a thousandfold, while the matrix can't be factorised.

        Raises NonFiniteError for NaN or inf, and when the last rung fails.
        """
        mean, silent_I = gram_II.diagonal().mean(), gram_II.diagonal() == 0
        gram_II = with_live_diagonal(gram_II)
        diagonal_I = gram_II.diagonal().clone()
        for tried in rungs(damping):
            ridge_I = tried * (mean.expand_as(diagonal_I) if on == "inputs" else diagonal_I)
            scale_I = (diagonal_I + ridge_I if on == "inputs" else diagonal_I).sqrt()
            h_II = (gram_II + torch.diag_embed(ridge_I)) / (scale_I[:, None] * scale_I)
            if not int(torch.linalg.cholesky_ex(h_II)[1]):
                return cls(h_II, scale_I, ridge_I, tried, silent_I)
        raise singular(damping)

    def inverse(self, rho: float = 0.0) -> Tensor:
        """The inverse of ``h_II`` + rho I, [inputs, inputs], in its dtype; the last one is kept."""
        if rho not in self._inverses:
            self._inverses.clear()
            penalised_II = self.h_II + torch.diag_embed(torch.full_like(self.h_II.diagonal(), rho))
            self._inverses[rho] = torch.cholesky_inverse(torch.linalg.cholesky(penalised_II))
        return self._inverses[rho]

    def problem(self, w_OI: Tensor, cross_II: Tensor | None = None, added_OI: Tensor | None = None) -> Problem:
        """The problem of one dense weight [outputs, inputs].

        ``cross_II`` is X^T X0 with the inputs of the dense network; without, the outputs that are wanted are those of
        the dense weight on the same inputs. ``added_OI`` is E^T X, where E is wanted on top of them. What is added to H
        is added to G for the dense weight as well, so that damping pulls towards it.
        """
        w_OI = w_OI.to(self.h_II.dtype)
        scaled_OI = w_OI * self.scale_I
        g_OI = scaled_OI @ self.h_II
        if cross_II is not None:
            # of inputs that were never active the dense weight stays
            pulled_OI = w_OI * (self.ridge_I + self.silent_I)
            g_OI = (w_OI @ cross_II.to(w_OI.dtype).T + pulled_OI) / self.scale_I
        if added_OI is not None:
            g_OI = g_OI + added_OI.to(g_OI.dtype) / self.scale_I
        same = cross_II is None and added_OI is None
        start_OI = scaled_OI if same else torch.cholesky_solve(g_OI.T, torch.linalg.cholesky(self.h_II)).T
        return Problem(self, g_OI, start_OI, w_OI)


@dataclass(frozen=True)
class Problem:
    """One weight's problem in scaled inputs: ``g_OI``, and ``start_OI``, its solution when nothing is pruned.

    ``dense_OI`` is the dense weight, not scaled.
    """

    curvature: Curvature
    g_OI: Tensor
    start_OI: Tensor
    dense_OI: Tensor

    @property
    def h_II(self) -> Tensor:
        """H in scaled inputs."""
        return self.curvature.h_II

    def without_silent(self) -> Problem:
        """The same where weights of inputs that were never active are zero: what chooses by it takes them first.

        Their unit diagonal is no size of theirs, and next to quiet inputs they would look loud.
        """
        silent_I = self.curvature.silent_I
        if not bool(silent_I.any()):
            return self
        return replace(self, g_OI=self.g_OI.masked_fill(silent_I, 0), start_OI=self.start_OI.masked_fill(silent_I, 0))

    def scaled(self, w_OI: Tensor) -> Tensor:
        """A weight in scaled inputs."""
        return w_OI.to(self.h_II.dtype) * self.curvature.scale_I

    def unscaled(self, scaled_OI: Tensor) -> Tensor:
        """A weight in the inputs as they are."""
        return scaled_OI / self.curvature.scale_I

    def loss(self, w_OI: Tensor) -> float:
        """sum(-W * G + W * (W H) / 2) with damping, summed in float64: half the squared error up to a constant."""
        scaled_OI = self.scaled(w_OI)
        return float(((scaled_OI @ self.h_II).double() / 2 - self.g_OI.double()).mul_(scaled_OI.double()).sum())
