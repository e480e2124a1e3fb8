"""ALPS on one weight: ADMM whose penalty follows how much the support still changes.

    B <- (G - V + rho D) (H + rho I)^-1;   D <- largest entries of B + V / rho;   V <- V + rho (B - D)

in inputs scaled to a unit diagonal. Every three steps the number s of entries whose fate has changed since the last
check decides on rho (k entries stay): s > k/10: times 1.3; s > k/200: times 1.2; s >= 1: times 1.1; s = 0: the end.
Before rho has been raised by one of the first two rules it was too large from the start: it is divided by five, and
where s >= 1 all begins again. O outputs, I inputs.

Source: X. Meng et al., "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models",
NeurIPS 2024, arXiv:2406.07831; official code mazumder-lab/ALPS.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from secateur.solver.problem import Problem
from secateur.solver.splitting import Choose, Splitting

CHECK_EVERY = 3
_RAISES = ((0.1, 1.3), (0.005, 1.2))
_LAST_RAISE, _FALL, _MOST = 1.1, 5.0, 1e6
# after so many steps a change of less than this share of the support is the end
_PATIENCE, _SETTLED = 30, 3e-4


@dataclass(frozen=True)
class Penalty:
    """The schedule of rho: its value, and whether it was raised by one of the first two rules."""

    rho: float
    raised: bool = False

    def after(self, changed: int, kept: int, step: int) -> tuple[Penalty, str]:
        """(the next penalty, what to do: ``go on``, ``begin again`` or ``stop``); ``changed`` of ``kept`` entries."""
        if step > _PATIENCE and changed < _SETTLED * kept:
            return self, "stop"
        for share, factor in _RAISES:
            if changed > share * kept:
                return Penalty(min(self.rho * factor, _MOST), raised=True), "go on"
        if not self.raised:
            return replace(self, rho=self.rho / _FALL), "begin again" if changed else "go on"
        if not changed:
            return self, "stop"
        return replace(self, rho=min(self.rho * _LAST_RAISE, _MOST)), "go on"


def alps(problem: Problem, choose: Choose, *, rho: float = 0.1, steps: int = 300) -> tuple[Tensor, Tensor, int]:
    """(weight [outputs, inputs], keep mask, steps taken); the weight is B on its support and wants a refit.

    ``choose`` ranks absolute values in scaled inputs, [outputs, inputs] → keep.
    """
    penalty, splitting = Penalty(rho), Splitting(problem)
    splitting.begin(choose)
    kept = max(int(splitting.keep_OI.count_nonzero()), 1)
    checked_OI, step = splitting.keep_OI, 0
    for step in range(1, steps + 1):
        splitting.solve(penalty.rho)
        splitting.project(choose)
        if step % CHECK_EVERY:
            continue
        changed = int((splitting.keep_OI != checked_OI).count_nonzero())
        before, (penalty, what) = penalty.rho, penalty.after(changed, kept, step)
        if what == "stop":
            break
        splitting.rescale(before, penalty.rho)
        if what == "begin again":
            splitting.begin(choose)
        checked_OI = splitting.keep_OI
    b_OI = splitting.solution()
    keep_OI = choose(b_OI.abs())
    return problem.unscaled(b_OI * keep_OI), keep_OI, step


def alps_flops(outputs: int, inputs: int, steps: int = 30) -> int:
    """Operations of one weight in ``steps`` steps, as many as it usually takes: an inverse for every check."""
    return 2 * inputs**3 * -(-steps // CHECK_EVERY) + 2 * steps * outputs * inputs * inputs
