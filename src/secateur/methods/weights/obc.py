"""OBC: the optimal brain surgeon on every row, one weight at a time, exactly.

    remove the p with the smallest w_p^2 / [H^-1]_pp;   w <- w - w_p / [H^-1]_pp * [H^-1]_:,p
    H^-1 <- H^-1 - [H^-1]_:,p [H^-1]_p,: / [H^-1]_pp;   until the row is empty, noting the loss of every step
    all rows' losses together: the ceil(entries * sparsity) smallest say how many weights every row loses
    w of what stays: least squares, which is where the updates lead

A pattern N:M closes a run of M once N of it have left, and every row loses its share. Blocks are calibrated in
sequence. `target=dense` takes what is wanted from the dense model. Every row has an inverse of its own: the cost grows
with outputs * inputs^3, so this is for small layers and for comparisons. `secateur estimate` says how long it takes.

Source: E. Frantar et al., "Optimal Brain Compression", NeurIPS 2022, arXiv:2208.11580; official code IST-DASLab/OBC;
B. Hassibi and D. Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon", 1993. Differs from the
official code: float64 throughout, and the weights are solved for on the final support instead of being looked up in
the trace of updates, which is the same but for rounding.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.allocate import parse_pattern
from secateur.healing import problem_of
from secateur.methods import Descriptor, Seen, Target, WeightMethod, option, register
from secateur.observe import Gram
from secateur.solver import cg_flops, greedy, greedy_bytes, greedy_flops, refit, spread


@register("obc")
@dataclass(frozen=True, kw_only=True)
class OBC(WeightMethod):
    """Options of OBC."""

    damping: float = option(0.0, "added to the diagonal of H, relative to its mean", ge=0)

    statistics: ClassVar = {"gram": Gram}
    sequential: ClassVar[bool] = True
    fits: ClassVar[bool] = True
    costly: ClassVar[bool] = True
    rounds_up: ClassVar[bool] = True
    descriptor: ClassVar = Descriptor(
        object="weights",
        granularity="element",
        score="second_order",
        allocation="uniform",
        recovery="least_squares",
        data="unlabelled_calibration",
        speedup="memory_only",
    )

    def prune(self, target: Target, seen: Seen) -> tuple[Tensor, Tensor | None, tuple[str, ...]]:
        problem, notes = problem_of(target.name, target.weight, seen, self.damping, exact=True)
        start, inverse = problem.without_silent().start_OI, problem.curvature.inverse()
        inputs = target.weight.shape[1]
        if self.pattern:
            rule = parse_pattern(self.pattern)
            order, losses = greedy(start, inverse, group=rule.m, most=rule.n)
            count = losses.numel()
        else:
            order, losses = greedy(start, inverse)
            # rounding of a product such as 0.7 * 30 is no entry more
            count = math.ceil(round(losses.numel() * self.sparsity, 6))
        keep = spread(order, losses, count, inputs)
        return keep, refit(problem, keep).to(target.weight.dtype), notes

    def solve_bytes(self, outputs: int, inputs: int) -> int:
        return greedy_bytes(outputs, inputs)

    def solve_flops(self, outputs: int, inputs: int) -> int:
        return greedy_flops(outputs, inputs) + cg_flops(outputs, inputs)
