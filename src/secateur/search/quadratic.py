"""The loss as a quadratic function of which weights are pruned.

Source: iCBS, arXiv:2411.17796. n weights of one matrix; x_i = 1 prunes weight i.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.solver.binary import Factored, Floats

# what counts as nothing, where entries are 1 on average
NOTHING = 1e-12

CUTOFFS = ("abs", "official")


# a sum of up to weights / FEW squares is worked with as such; with twice as many the whole matrix is as fast
FEW = 32


@dataclass(frozen=True)
class Quadratic:
    """x'Qx + c, the change of the loss when the weights of x are pruned and the others have their original values.

    ``Q`` is [n, n] float64 and symmetric. ``free`` [n] bool marks weights that no sample's loss depends on.
    """

    Q: Tensor
    c: float
    free: Tensor

    def change(self, x: Tensor) -> float:
        """The change of the loss for ``x``, [n] bool."""
        return float(self.Q[x][:, x].sum()) + self.c

    def cpu(self) -> Quadratic:
        """The same on the CPU."""
        return Quadratic(self.Q.cpu(), self.c, self.free.cpu())

    def problem(self, among: Tensor, cutoff: str) -> Floats:
        """What a solver is given of the weights ``among``, indices; as many as there are stand in order."""
        return cut_off(self.Q if len(among) == len(self.Q) else self.Q[among][:, among], cutoff).numpy()


@dataclass(frozen=True)
class FactoredQuadratic:
    """A ``Quadratic`` with Q = A A' + diag(linear), which is never built: ``factor`` A is [n, samples]."""

    factor: Tensor
    linear: Tensor
    c: float
    free: Tensor

    def change(self, x: Tensor) -> float:
        """The change of the loss for ``x``, [n] bool."""
        return float(self.factor[x].sum(dim=0).square().sum() + self.linear[x].sum()) + self.c

    def cpu(self) -> FactoredQuadratic:
        """The same on the CPU."""
        return FactoredQuadratic(self.factor.cpu(), self.linear.cpu(), self.c, self.free.cpu())

    def problem(self, among: Tensor, cutoff: str) -> Floats | Factored:
        """What a solver is given of the weights ``among``, indices; entries that are nothing needn't vanish."""
        found = Factored(self.factor[among].numpy(), self.linear[among].numpy())
        return cut_off(torch.from_numpy(found.whole()), cutoff).numpy() if cutoff == "official" else found


def quadratic(
    original: Tensor, current: Tensor, gradient: Tensor, hessian: Tensor, *, multiplier: float = 1.0, ridge: float = 0.0
) -> Quadratic:
    """The model of the loss around the ``current`` weights, which are ``original`` or zero; all [n], H is [n, n].

    With d = w - w0 the step to x is delta = -(d + w0 * x), and g'delta + 1/2 delta'H delta is x'Qx + c with

        Q = 1/2 diag(w0) H diag(w0) + diag(w0 * (H d)) - gm * diag(w0 * g) + lam * diag(w0 * (2 d + w0))
        c = 1/2 d'H d - gm * g'd + lam * ||d||^2

    gm, the ``multiplier`` of the gradient, is 1 for the exact expansion; lam, the ``ridge``, weighs ||delta||^2.
    """
    w0, g, H = original.double(), gradient.double(), hessian.double()
    d = current.double() - w0
    linear, constant = _rest(w0, d, g, H @ d, multiplier, ridge)
    curved = w0[:, None] * H * w0 / 2
    return Quadratic(curved + torch.diag(linear), constant, (g == 0) & (H == 0).all(dim=1))


def outer_quadratic(
    original: Tensor, current: Tensor, gradient: Tensor, each_Sn: Tensor, *, multiplier: float = 1.0, ridge: float = 0.0
) -> Quadratic | FactoredQuadratic:
    """``quadratic`` with H = each' each / S, the mean of outer products, as a factor where S is small beside n."""
    each, samples = each_Sn.double(), len(each_Sn)
    if samples * FEW > len(original):
        return quadratic(original, current, gradient, each.T @ each / samples, multiplier=multiplier, ridge=ridge)
    w0, g = original.double(), gradient.double()
    d = current.double() - w0
    linear, constant = _rest(w0, d, g, each.T @ (each @ d) / samples, multiplier, ridge)
    factor = (w0 * each / math.sqrt(2 * samples)).T.contiguous()
    return FactoredQuadratic(factor, linear, constant, (g == 0) & (each == 0).all(dim=0))


def _rest(w0: Tensor, d: Tensor, g: Tensor, pushed: Tensor, multiplier: float, ridge: float) -> tuple[Tensor, float]:
    """(what is added to the diagonal of Q, c), where H pushes d to ``pushed``."""
    linear = w0 * (pushed - multiplier * g + ridge * (2 * d + w0))
    return linear, float(d @ pushed / 2 - multiplier * (g @ d) + ridge * (d @ d))


def cut_off(Q: Tensor, kind: str) -> Tensor:
    """Q, scaled so that its entries are 1 on average, without those of ``NOTHING`` or less.

    ``abs`` goes by the size of an entry. ``official`` is the rule of the published code, which goes by its value: all
    negative entries vanish with it.
    """
    entries = int(Q.count_nonzero())
    scaled = Q / (Q.abs().sum() / entries if entries else 1.0)
    return scaled.masked_fill_((scaled if kind == "official" else scaled.abs()) <= NOTHING, 0)
