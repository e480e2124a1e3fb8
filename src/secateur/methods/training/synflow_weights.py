"""SynFlow on weights: before training, and without data, keep the weights through which most synaptic flow passes.

    R = sum of the outputs with |theta| for theta, on inputs of ones
    s = |theta * dR/dtheta|
    density after round k of n = (1 - sparsity)^(k / n)

The flow through every layer is the same, so that many rounds never empty one. All weights compete; removed ones have no
flow. `synflow` is the same for coupled channels.

Source: H. Tanaka et al., "Pruning neural networks without any data by iteratively conserving synaptic flow", NeurIPS
2020, arXiv:2006.05467; official code ganguli-lab/Synaptic-Flow. Differs from it: weights are chosen by index, so that
ties don't remove more; flow is in float64, where products over many layers stay in range.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.methods import Descriptor, StartingMethod, Trained, option, register


@register("synflow_weights")
@dataclass(frozen=True, kw_only=True)
class SynFlowWeights(StartingMethod):
    """Options of SynFlow; defaults from the paper."""

    rounds: int = option(100, "rounds of scoring and removing", unit="rounds", ge=1)

    needs: ClassVar = ("flow",)
    descriptor: ClassVar = Descriptor(
        object="weights",
        granularity="element",
        when="before_training",
        score="synaptic_flow",
        allocation="global",
        data="none",
        speedup="memory_only",
    )

    def score(self, part: Trained) -> Tensor:
        return part.flow
