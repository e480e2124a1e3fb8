"""OSSCAR: remove the heads and neurons that all others can make up for best, a few per round, then solve for the rest.

    H = X^T X + damping * mean(diag) I of the inputs of o_proj or down_proj;   G = W H
    round:  for every unit g that is left   obj_g = 1/2 * sum over outputs of  W[:,g] ([H^-1]_gg)^-1 W[:,g]^T
            the units P with the smallest obj leave together:
            W <- W - W[:,P] ([H^-1]_PP)^-1 [H^-1]_P,:;   H^-1 <- H^-1 - [H^-1]_:,P ([H^-1]_PP)^-1 [H^-1]_P,:
    finally W_K = G_K (H_KK)^-1 on the columns K that stay          (heal=refit, the default here)

obj_g is exactly what the squared error grows by. `neuron_update` and `head_update` are the units of one round.
`local_search` then takes as many of the cheapest units out again and puts those back that the fit gains most from,
while the loss falls. Every layer loses the same share; blocks are calibrated in sequence. `target=dense` fits to the
outputs of the dense model (`fullseq` in the official code).

Source: X. Meng et al., "OSSCAR: One-Shot Structured Pruning in Vision and Language Models with Combinatorial
Optimization", ICML 2024, arXiv:2403.12983; official code mazumder-lab/OSSCAR. Differs from the official code: a
key-value head leaves with all of its queries (`heads=kv`); what whole heads leave over of a layer's share comes out of
its neurons (`fill`); rounds run until nothing is left, so that the order doesn't depend on the sparsity.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.allocate import Allocator, UniformAllocator
from secateur.healing import EXACT_INPUTS, problem_of
from secateur.methods import Descriptor, Seen, Target, UnitMethod, option, register
from secateur.observe import Gram
from secateur.solver import Problem, elimination, elimination_flops, swaps


@register("osscar")
@dataclass(frozen=True, kw_only=True)
class OSSCAR(UnitMethod):
    """Options of OSSCAR; defaults from the official code."""

    neuron_update: int = option(10, "neurons that leave together in a round", unit="neurons", ge=1)
    head_update: int = option(2, "heads that leave together in a round", unit="heads", ge=1)
    local_search: bool = option(False, "swap units while that lowers the loss")
    swap_heads: int = option(5, "heads that are swapped together", unit="heads", ge=1)
    search_rounds: int = option(30, "rounds of swaps at most", unit="rounds", ge=1)
    damping: float = option(0.01, "added to the diagonal of H, relative to its mean", ge=0)
    fill: bool = option(True, "meet the budget exactly by taking what coarse heads leave over from the neurons")
    heal: str = option(
        "refit", "refit: solve for the columns that stay by least squares", choices=("none", "bias", "refit")
    )

    statistics: ClassVar = {"gram": Gram}
    sequential: ClassVar[bool] = True
    fits: ClassVar[bool] = True
    costly: ClassVar[bool] = True
    descriptor: ClassVar = Descriptor(
        object="heads_and_neurons",
        granularity="structured_group",
        score="second_order",
        allocation="uniform",
        recovery="least_squares",
        data="unlabelled_calibration",
        speedup="real",
    )

    def score(self, target: Target, seen: Seen) -> Tensor:
        at_once = self.neuron_update if target.kind == "neuron" else self.head_update
        return elimination(self._problem(target, seen), target.columns, at_once=at_once)

    def revise(self, target: Target, seen: Seen, removed: Tensor) -> Tensor:
        if not self.local_search:
            return removed
        gone = torch.zeros(target.units, dtype=torch.bool, device=target.weight.device)
        gone[removed.to(gone.device)] = True
        at_once = self.neuron_update if target.kind == "neuron" else self.swap_heads
        problem = self._problem(target, seen)
        return swaps(problem, target.columns, gone, at_once=at_once, most=self.search_rounds).nonzero().flatten()

    def allocator(self) -> Allocator:
        return UniformAllocator(self.sparsity, self.fill)

    def solve_flops(self, outputs: int, inputs: int) -> int:
        return elimination_flops(outputs, inputs)

    def _problem(self, target: Target, seen: Seen) -> Problem:
        exact = target.weight.shape[1] <= EXACT_INPUTS
        return problem_of(target.name, target.weight, seen, self.damping, exact=exact)[0].without_silent()
