"""SynFlow: remove the coupled channels through which the least synaptic flow passes, in any untrained network.

    R    = sum of the outputs with |theta| for theta, on inputs of ones         (eq. 2)
    s(w) = |w * dR/dw|                                                          weights of layers only
    I_k  = sum over the coupled slices of channel k, over their entries, of s(w)

Round k of n removes channels until (1 - sparsity)^(k/n) of the budget is left, and takes the scores of what is left
once more. The flow through every layer is the same, so many rounds never empty one. No data.

Source: H. Tanaka et al., "Pruning neural networks without any data by iteratively conserving synaptic flow", NeurIPS
2020, arXiv:2006.05467; official code ganguli-lab/Synaptic-Flow. Differs from it: coupled channels leave instead of
single weights (sums of scores as in SPA, arXiv:2403.18955), and the budget counts the whole network.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.methods import ChannelMethod, Descriptor, Whole, option, register


@register("synflow")
@dataclass(frozen=True, kw_only=True)
class SynFlow(ChannelMethod):
    """Options of SynFlow; defaults from the paper."""

    normalizer: str = option("none", "what the scores of a group are divided by", choices=("none", "mean", "max"))
    rounds: int = option(100, "rounds of scoring and removing", unit="rounds", ge=1)

    only_modules: ClassVar = "synaptic flow is a gradient, which an ONNX model doesn't give; take spa_l1"
    descriptor: ClassVar = Descriptor(
        object="channels",
        granularity="structured_group",
        when="before_training",
        score="synaptic_flow",
        allocation="global",
        data="none",
        speedup="real",
    )

    def schedule(self) -> tuple[float, ...]:
        if self.sparsity == 0:
            return (0.0,)
        return tuple(1 - (1 - self.sparsity) ** (k / self.rounds) for k in range(1, self.rounds + 1))

    def scores(self, whole: Whole) -> Mapping[str, Tensor | None]:
        flow = whole.flow({})
        return {
            group.name: self.reduced(group, lambda part: flow[part.tensor] if part.role == "weight" else None)
            for group in whole.groups
        }
