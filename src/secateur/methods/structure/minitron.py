"""Minitron: remove the heads and neurons whose activations are small, by norms over texts of means over tokens.

    A_j   = sqrt( sum over texts of (mean over tokens of |x_j|)^2 )     x the input of down_proj, or of o_proj
    neuron: A_j of its channel                 head: sqrt( sum over its channels of A_j^2 )

Only forward passes are needed. Every layer loses the same share, and heads are ranked inside their key-value group,
which stays: with one query head per key-value head no head can leave. `over_tokens` and `over_texts` are the other
ways to put tokens and texts together that the paper compares (`mean` of sizes, `l2` norm, `var`iance). The published
recipe distils from the dense model afterwards.

Source: S. Muralidharan et al., "Compact Language Models via Pruning and Knowledge Distillation", 2024,
arXiv:2407.14679; official code NVIDIA/Model-Optimizer. Differs from it: what whole heads leave over of a layer's share
comes out of its neurons (`fill`); hidden channels have a method of their own, `minitron_hidden`. Its score of blocks,
the sum of 1 - cos(input, output), ranks them as `shortgpt` does.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.allocate import Allocator, UniformAllocator
from secateur.criteria import per_unit
from secateur.methods import Descriptor, Seen, Target, UnitMethod, option, register
from secateur.observe import Amplitudes


@register("minitron")
@dataclass(frozen=True, kw_only=True)
class Minitron(UnitMethod):
    """Options of Minitron; defaults from the official code."""

    over_tokens: str = option(
        "mean", "what a channel is in one text: mean of |x|, norm, variance", choices=Amplitudes.WAYS
    )
    over_texts: str = option("l2", "how texts are put together", choices=Amplitudes.WAYS)
    heads: str = option(
        "query",
        "attention unit: one query head of each key-value head, or a key-value head with its queries",
        choices=("query", "kv"),
    )
    fill: bool = option(True, "meet the budget exactly by taking what coarse heads leave over from the neurons")

    statistics: ClassVar = {"amplitudes": Amplitudes}
    descriptor: ClassVar = Descriptor(
        object="heads_and_neurons",
        granularity="structured_group",
        score="activation",
        allocation="uniform",
        data="unlabelled_calibration",
        speedup="real",
    )

    def score(self, target: Target, seen: Seen) -> Tensor:
        channel_I = seen["amplitudes"].over(self.over_tokens, self.over_texts)
        return per_unit(channel_I.square(), target.columns, "sum").sqrt()

    def allocator(self) -> Allocator:
        return UniformAllocator(self.sparsity, self.fill)
