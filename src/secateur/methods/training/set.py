"""SET: sparse evolutionary training, the smallest weights give way to random connections every now and then.

Starts at a random mask by ERK. At an update, in every layer, the fraction zeta of the live weights that are smallest in
magnitude leave, and as many positions that are drawn among the dead ones begin at zero. The number of weights of a
layer never changes. By default `end` is three quarters of `steps`, so that what grew last is trained.

Source: D. Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse connectivity inspired by
network science", Nature Communications 2018, arXiv:1707.04780 (zeta = 0.3, once per epoch); as a baseline in
google-research/rigl. Differs from the paper: densities follow ERK with kernels, and magnitudes of both signs compete
(`split_signs=true`: the smallest positive and the largest negative weights leave, each the same fraction).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.methods import Descriptor, DynamicMethod, Trained, option, register
from secateur.methods.during import GROWTHS


@register("set")
@dataclass(frozen=True, kw_only=True)
class SET(DynamicMethod):
    """Options of SET; defaults from the paper."""

    decay: str = option("constant", "how that falls until end", choices=("cosine", "constant"))
    growth: str = option("random", "what grows first among dead weights", choices=tuple(GROWTHS))
    split_signs: bool = option(False, "positive and negative weights lose the same fraction each")

    descriptor: ClassVar = Descriptor(
        object="weights",
        granularity="element",
        when="during_training",
        score="magnitude",
        allocation="erk",
        recovery="training",
        data="none",
        speedup="memory_only",
    )

    def score(self, part: Trained) -> Tensor:
        if not self.split_signs:
            return part.weight.abs()
        # ranks within a sign, from 0 for the one next to zero to 1, so that a threshold takes the same share of both
        scores = torch.zeros_like(part.weight)
        for side in (part.mask & (part.weight >= 0), part.mask & (part.weight < 0)):
            order = part.weight[side].abs().argsort(stable=True).argsort(stable=True)
            scores[side] = (order + 0.5).to(scores) / max(len(order), 1)
        return scores
