"""The step that ADMM and ALPS share: a least-squares solution, and its projection onto what may stay.

    B <- (G + rho (D - U)) (H + rho I)^-1;   S = B + U;   D <- S where it stays, else 0;   U <- S - D

all in inputs scaled to a unit diagonal. D and U are what stays and what leaves of S, so S and the mask are all there is
to remember, and tensors are written in place: a step is one product and few passes over a weight. O outputs, I inputs.

Source: S. Boyd et al., "Distributed Optimization and Statistical Learning via the Alternating Direction Method of
Multipliers", Foundations and Trends in Machine Learning 3 (2011), section 3.1.1 (the scaled form).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from secateur.solver.problem import Problem

Choose = Callable[[Tensor], Tensor]
"""Absolute values [outputs, inputs] in scaled inputs, for as long as it looks at them → keep, bool of that shape."""


class Splitting:
    """``sum_OI`` is S, ``keep_OI`` the mask; at first the solution when nothing is pruned, of which all stays."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self.sum_OI = problem.start_OI.clone()
        self.keep_OI = torch.ones_like(self.sum_OI, dtype=torch.bool)
        self._u_OI, self._right_OI = torch.zeros_like(self.sum_OI), torch.empty_like(self.sum_OI)
        self._carried = 1.0

    def begin(self, choose: Choose) -> None:
        """Project the solution when nothing is pruned; U is 0."""
        self.sum_OI.copy_(self._problem.start_OI)
        self._u_OI.zero_()
        self.project(choose)
        self._carried = 0.0

    def project(self, choose: Choose) -> None:
        """Choose the mask anew."""
        # a buffer that the next step overwrites
        self.keep_OI = choose(torch.abs(self.sum_OI, out=self._right_OI))

    def rescale(self, before: float, rho: float) -> None:
        """From now on the penalty is another one; rho U stays what it is."""
        self._carried *= before / rho

    def solve(self, rho: float) -> None:
        """The next S."""
        carried, self._carried = self._carried, 1.0
        # a product, since where() and masked_fill() branch at every entry
        u_OI = torch.mul(self.sum_OI, ~self.keep_OI, out=self._u_OI)
        # rho (D - U), with D = S - u and U = carried * u
        right_OI = torch.add(self._problem.g_OI, self.sum_OI, alpha=rho, out=self._right_OI)
        right_OI.add_(u_OI, alpha=-rho * (1 + carried))
        if carried != 1:
            u_OI.mul_(carried)
        torch.addmm(u_OI, right_OI, self._problem.curvature.inverse(rho), out=self.sum_OI)

    def solution(self) -> Tensor:
        """B of the last step, [outputs, inputs]."""
        return self.sum_OI - self._u_OI
