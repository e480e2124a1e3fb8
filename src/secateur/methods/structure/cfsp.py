"""CFSP: remove the FFN neurons that are least active, most of them from blocks that hardly turn the residual stream.

    coarse: what a block loses follows the angle between its input and output      (the allocator `cfsp`)
    fine:   n_j = sqrt( mean over sequences of sum over tokens of x_j^2 )          x the input of down_proj
            three_w_one_wa    mean over i of (|W_ij| n_j^b / sum_i |W_ij| n_j^b + |U_ij| / sum_i |U_ij|
                                              + |G_ij| / sum_i |G_ij|) * n_j^c  =  3 n_j^c / d
            three_w_one_a     the same with b = 0                               =  3 n_j^c / d
            one_wa            the first of the three                            =  n_j^c / d
            one_a             the same with b = 0 and c = 0.5                   =  n_j^0.5 / d
            wanda_base        mean over i of |W_ij| n_j
            mag_base          ||W_:,j||_2
            eq8               sum over i of |W_ij| n_j / (||W_i,:||_1 ||n||_1), the paper's reading
    W is down_proj, U and G up_proj and gate_proj transposed, all [d, I]

Every ratio is divided by its sum over the index over which it is averaged afterwards, so that the weights cancel, and
so does b: four of the scores rank neurons by their activations alone. In `eq8` the ratios of U and G are the same for
all. Attention stays as it is. `--allocate` takes another coarse stage, or this one with options
(`cfsp:metric=cosine,alpha=2`); `round_to=128` is `cuda_friendly`. `budget=neurons` makes the sparsity a fraction of the
neurons, as the published ratio is. Recovery by IG-LoRA gives adapters a rank in proportion to what their block kept:
`--heal lora:ranks=importance`.

Source: Y. Wang et al., "CFSP: An Efficient Structured Pruning Framework for LLMs with Coarse-to-Fine Activation
Information", COLING 2025, arXiv:2409.13199; official code wyxscir/CFSP. Differs from it: the sparsity is by default a
fraction of the blocks' parameters, as for all methods; blocks are observed in a pass of their own, before neurons are;
numbers of neurons are rounded to the nearest (theirs: up, without `cuda_friendly`); `mag_base` is what it is meant to
be (theirs fails). The allocator says in what it differs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.allocate import Allocator, UniformAllocator
from secateur.criteria import column_energy, per_unit, weighted_magnitude
from secateur.methods import Descriptor, NeuronMethod, Seen, Target, option, register
from secateur.observe import Statistic, SumSquares

# how many ratios are summed; a factor that is the same for all neurons of a block
_RATIOS = {"three_w_one_wa": 3, "three_w_one_a": 3, "one_wa": 1, "one_a": 1}


@register("cfsp")
@dataclass(frozen=True, kw_only=True)
class CFSP(NeuronMethod):
    """Options of CFSP; defaults from the official code."""

    metric: str = option("three_w_one_wa", "score of a neuron", choices=(*_RATIOS, "wanda_base", "mag_base", "eq8"))
    c: float = option(1.0, "exponent of the activations in three_w_one_wa, three_w_one_a and one_wa", gt=0)

    statistics: ClassVar = {"squares": SumSquares}
    spread: ClassVar[str] = "cfsp"
    descriptor: ClassVar = Descriptor(
        object="heads_and_neurons",
        granularity="structured_group",
        score="activation",
        allocation="global",
        data="unlabelled_calibration",
        speedup="real",
    )

    def needed_statistics(self) -> Mapping[str, type[Statistic]]:
        return {} if self.metric == "mag_base" else self.statistics

    def score(self, target: Target, seen: Seen) -> Tensor:
        w_OI = target.weight
        if self.metric == "mag_base":
            return per_unit(column_energy(w_OI).sqrt(), target.columns, "sum")
        square_I = seen["squares"].mean_per_sequence().to(w_OI.device)
        return per_unit(self._channels(w_OI, square_I), target.columns, "sum")

    def _channels(self, w_OI: Tensor, square_I: Tensor) -> Tensor:
        if self.metric == "wanda_base":
            return weighted_magnitude(w_OI, square_I).double().mean(dim=0)
        norm_I = square_I.sqrt()
        if self.metric == "eq8":
            size_OI = w_OI.double().abs()
            # an output without weights has no channels to tell apart
            share_OI = size_OI / size_OI.sum(dim=1, keepdim=True).clamp_min(1e-300)
            return share_OI.sum(dim=0) * norm_I / norm_I.sum().clamp_min(1e-300)
        exponent = 0.5 if self.metric == "one_a" else self.c
        return _RATIOS[self.metric] / w_OI.shape[0] * norm_I.pow(exponent)

    def allocator(self) -> Allocator:
        return UniformAllocator(self.sparsity)
