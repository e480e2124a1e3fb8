"""ShortGPT: remove the decoder blocks that change the residual stream least.

    BI_l = 1 - mean over tokens of cos(h_l, h_{l+1})        h_l enters block l, h_{l+1} leaves it  (eq. 1)

The blocks with the smallest Block Influence leave in one shot, without healing. All tokens count, padding aside.

Source: X. Men et al., "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect", 2024,
arXiv:2403.03853 (no official code).
"""

from dataclasses import dataclass
from typing import ClassVar

from secateur.methods import Descriptor, LayerMethod, Seen, Target, register
from secateur.observe import Similarity


@register("shortgpt")
@dataclass(frozen=True, kw_only=True)
class ShortGPT(LayerMethod):
    """Options of ShortGPT."""

    statistics: ClassVar = {"similarity": Similarity}
    descriptor: ClassVar = Descriptor(
        object="layers",
        granularity="layer",
        score="similarity",
        allocation="global",
        data="unlabelled_calibration",
        speedup="real",
    )

    def score(self, target: Target, seen: Seen) -> float:
        return 1.0 - seen["similarity"].mean
