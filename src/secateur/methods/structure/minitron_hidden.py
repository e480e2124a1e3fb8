"""Minitron's width: remove the hidden channels that are small behind the norms, everywhere at once.

    A_j     = sqrt( sum over texts of (mean over tokens of |x_j|)^2 )     x what an attention or an MLP reads
    channel = sum of A_j over all of them

One order of the channels counts for all layers: a channel leaves the embedding, every matrix that reads the residual
stream or adds to it, every norm, and the head. All matrices become smaller, and the checkpoint stays a plain one.
`minitron` does the same to heads and neurons. The published recipe distils from the dense model afterwards, without
which little is left of what the model knew.

Source: S. Muralidharan et al., "Compact Language Models via Pruning and Knowledge Distillation", 2024,
arXiv:2407.14679; official code NVIDIA/Model-Optimizer. Differs from it: where norms stand behind attentions and MLPs,
what these read is looked at, and not what the norms give.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.methods import Descriptor, HiddenMethod, Seen, Target, option, register
from secateur.observe import Amplitudes


@register("minitron_hidden")
@dataclass(frozen=True, kw_only=True)
class MinitronHidden(HiddenMethod):
    """Options of Minitron's hidden channels; defaults from the official code."""

    over_tokens: str = option(
        "mean", "what a channel is in one text: mean of |x|, norm, variance", choices=Amplitudes.WAYS
    )
    over_texts: str = option("l2", "how texts are put together", choices=Amplitudes.WAYS)

    statistics: ClassVar = {"amplitudes": Amplitudes}
    descriptor: ClassVar = Descriptor(
        object="hidden_states",
        granularity="channel",
        score="activation",
        allocation="uniform",
        data="unlabelled_calibration",
        speedup="real",
    )

    def score(self, target: Target, seen: Seen) -> Tensor:
        return seen["amplitudes"].over(self.over_tokens, self.over_texts)
