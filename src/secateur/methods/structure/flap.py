"""FLAP: remove the channels that hardly fluctuate, and put their mean into a bias.

An input channel of o_proj or down_proj that stays close to its mean can be replaced by that mean, a constant.

    f_j  = 1/(N-1) * sum over the N calibration tokens of (X_nj - mean_j)^2
    S_j  = f_j * sum_i W_ij^2            WIFV (default);  IFV: f_j;  WIFN: mean_i |W_ij| * ||X_j||_2
    S_j <- S_j^2 for o_proj              (in the official code, not in the paper)
    z_j  = (S_j - mean S) / std S        over the channels of one layer and module
    head = mean of z_j over the channels of the head
    all heads and neurons of the model compete on z, each with its true cost in parameters, until the budget is met
    bias += W[:, removed] @ mean[removed]

Statistics come from the dense model in one pass. Structures: `AL-AM` adaptive over layers and modules (the method);
`AL-MM` over layers with a given number of heads; `UL-MM`, `UL-UM` the same in every layer.

On SmolLM2-135M `AL-AM` is ahead at 20 % only: at 40 % its perplexity is 191, that of `UL-UM` 112, at 50 % 340 and 167.
So try `structure=UL-UM` beyond a fifth on models this small. The bias is no extra: without it `AL-AM` is 54 times as
bad at 40 % ([measured](../results/flap-smollm2-135m.md)).

Source: Y. An et al., "Fluctuation-based Adaptive Structured Pruning for Large Language Models", AAAI 2024,
arXiv:2312.11983; official code CASIA-IVA-Lab/FLAP. Differs from the official code: exact variance (theirs: a
streaming formula with a small-sample bias, `variance="streaming"`); a head costs its true parameters, key-value
heads included (theirs: 512/3 neurons, an MHA of head size 128); the unit at the threshold stays when that is nearer
to the budget (theirs always drops it, `strict`); `UL-UM` takes from the neurons what whole heads leave over of a
layer's share, so that the budget is met (theirs removes less, `fill=False`); an existing bias is added to, not
overwritten; min_keep.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.allocate import Allocator, GlobalAllocator, ManualAllocator, UniformAllocator
from secateur.criteria import column_energy, per_unit, standardise, weighted_magnitude
from secateur.healing import BiasHealer
from secateur.methods import Descriptor, Seen, Target, UnitMethod, option, register
from secateur.observe import Moments, SequenceMoments, Statistic, SumSquares


@register("flap")
@dataclass(frozen=True, kw_only=True)
class FLAP(UnitMethod):
    """Options of FLAP; defaults from the official code."""

    metric: str = option("WIFV", "channel score", choices=("WIFV", "IFV", "WIFN"))
    structure: str = option("AL-AM", "how the budget is spread", choices=("AL-AM", "AL-MM", "UL-MM", "UL-UM"))
    bias: bool = option(True, "compensate the removed channels by a bias")
    square_attn: bool = option(True, "square the scores of attention channels, as the official code does")
    variance: str = option("exact", "exact, or the official streaming formula", choices=("exact", "streaming"))
    strict: bool = option(False, "AL-AM: also drop the unit at the threshold, as the official code does")
    remove_heads: int = option(8, "AL-MM, UL-MM: attention units removed in the whole model", unit="units", ge=0)
    fill: bool = option(True, "UL-UM: take what coarse heads leave over of the budget from the neurons")

    statistics: ClassVar = {"moments": Moments, "squares": SumSquares, "sequences": SequenceMoments}
    descriptor: ClassVar = Descriptor(
        object="heads_and_neurons",
        granularity="structured_group",
        score="activation",
        allocation="global",
        recovery="bias",
        data="unlabelled_calibration",
        speedup="real",
    )

    def needed_statistics(self) -> Mapping[str, type[Statistic]]:
        extra = "squares" if self.metric == "WIFN" else "sequences" if self.variance == "streaming" else "moments"
        return {name: self.statistics[name] for name in ("moments", extra)}

    def score(self, target: Target, seen: Seen) -> Tensor:
        channel_I = self._channel_scores(target.weight, seen)
        if self.square_attn and target.kind != "neuron":
            channel_I = channel_I.square()
        if self.structure.startswith("UL"):
            return per_unit(channel_I, target.columns, "sum")
        return per_unit(standardise(channel_I), target.columns, "mean")

    def _channel_scores(self, w_OI: Tensor, seen: Seen) -> Tensor:
        if self.metric == "WIFN":
            square_sum_I = seen["squares"].mean_per_sequence().to(w_OI.device)
            return weighted_magnitude(w_OI, square_sum_I).double().mean(dim=0)
        fluctuation_I = (
            streaming_fluctuation(seen["sequences"]) if self.variance == "streaming" else seen["moments"].variance()
        ).to(w_OI.device)
        return fluctuation_I if self.metric == "IFV" else fluctuation_I * column_energy(w_OI)

    def allocator(self) -> Allocator:
        if self.structure == "AL-AM":
            return GlobalAllocator(self.sparsity, self.strict)
        if self.structure == "UL-UM":
            return UniformAllocator(self.sparsity, self.fill)
        scope = "layer" if self.structure == "UL-MM" else "global"
        return ManualAllocator(self.sparsity, self.remove_heads, scope)

    def compensate(self, target: Target, seen: Seen, removed: Tensor) -> Tensor | None:
        if not self.bias:
            return None
        return BiasHealer().heal(target.weight, seen["moments"].mean_C, target.columns[removed].flatten())


def streaming_fluctuation(seen: SequenceMoments) -> Tensor:
    """The official recursion over sequences, [channels] float64: the mean is updated before the squares are taken.

    f <- f * (n-1)/n + sum over tokens of (x - mean_new)^2 / (n+1); the first sequence adds nothing.
    """
    sums_NC, squares_NC = seen.sums_NC, seen.squares_NC
    mean_C = torch.zeros_like(sums_NC[0])
    fluctuation_C = torch.zeros_like(mean_C)
    for n, tokens in enumerate(seen.tokens_per_sequence):
        mean_C = mean_C * n / (n + 1) + sums_NC[n] / tokens / (n + 1)
        if n > 0:
            deviation = squares_NC[n] - 2 * mean_C * sums_NC[n] + tokens * mean_C.square()
            fluctuation_C = fluctuation_C * (n - 1) / n + deviation / (n + 1)
    return fluctuation_C
