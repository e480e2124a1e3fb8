"""AMP: remove the heads that add least to the residual stream, and the neurons that are least active.

    head:    I_n = mean over prompts of mean over tokens of sum over outputs |(h_n W_n)_o|
             h_n is what head n mixes from the values, W_n its slice of o_proj
    neuron:  J_j = mean over prompts of mean over tokens of |a_j|                    a is the input of down_proj
    removed: nh = round(rho H) of H heads, at most H - 1
             nm = round(rho I + (rho H - nh) c) of I neurons, at most I - 1

rho is the sparsity, c how many neurons cost what a head does. Every layer loses as many, so the checkpoint stays plain.
Heads are scored by what they add with o_proj, neurons without down_proj. Every prompt weighs the same, whatever its
length. Key-value heads with several queries leave as a whole, scored by the sum of their queries. `order=reversed`
removes what counts most: the paper's check that the score means something. Published are 50 prompts of Alpaca, and LoRA
afterwards.

Source: L. Mugnaini et al., "Efficient LLMs with AMP: Attention Heads and MLP Pruning", IJCNN 2025, arXiv:2504.21174;
official code c2d-usp/Efficient-LLMs-with-AMP. Differs from it: there c = 1, a head is made up for by a single neuron
(`budget_fix=official`); its `iteration` k, the number of blocks to do without, is the sparsity k / L for L blocks;
a random order is the method `random_sp`.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.allocate import Allocator, RoundedAllocator
from secateur.criteria import per_unit
from secateur.methods import Descriptor, Seen, Target, UnitMethod, option, register
from secateur.observe import Amplitudes, Contributions


@register("amp")
@dataclass(frozen=True, kw_only=True)
class AMP(UnitMethod):
    """Options of AMP."""

    order: str = option(
        "standard", "remove what scores lowest, or (reversed) highest", choices=("standard", "reversed")
    )
    budget_fix: str = option(
        "exact",
        "neurons that make up for a rounded head: as many as it costs, or (official) one",
        choices=("exact", "official"),
    )

    statistics: ClassVar = {"contributions": Contributions, "amplitudes": Amplitudes}
    descriptor: ClassVar = Descriptor(
        object="heads_and_neurons",
        granularity="structured_group",
        score="activation",
        allocation="uniform",
        data="unlabelled_calibration",
        speedup="real",
    )

    def score(self, target: Target, seen: Seen) -> Tensor:
        if target.kind == "neuron":
            score_U = per_unit(seen["amplitudes"].over("mean", "mean"), target.columns, "sum")
        else:
            score_U = seen["contributions"].mean_U().reshape(target.units, -1).sum(dim=1)
        return -score_U if self.order == "reversed" else score_U

    def allocator(self) -> Allocator:
        return RoundedAllocator(self.sparsity, self.budget_fix == "exact")
