"""CriticalKV: weigh the scores of another method by what a token's value does to the output of the attention.

    score_j = (s_j + epsilon) * mean over the query heads of the group of ||W_o^h v_j||_1

The first int(S (1 - r) ``first``) tokens are those with the highest plain scores s of the method that is wrapped
(``of``). Scores that hold the norm of the value already (expected attention with ``value_norm``) would count it twice.

Source: Y. Feng et al., "Identify Critical KV Cache in LLM Inference from an Output Perturbation Perspective", 2025,
arXiv:2502.03805; NVIDIA kvpress v0.5.4.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.methods import Descriptor, Prompt, WrapperMethod, option, register
from secateur.methods.caching import top


@register("criticalkv")
@dataclass(frozen=True, kw_only=True)
class CriticalKV(WrapperMethod):
    """Options of CriticalKV; defaults of kvpress."""

    first: float = option(0.5, "fraction of the kept tokens that plain scores choose", ge=0, le=1)
    epsilon: float = option(1e-4, "what is added to plain scores before they are weighed", ge=0)

    descriptor: ClassVar = Descriptor(
        object="kv_cache", granularity="token", when="inference", score="attention", allocation="uniform", data="none",
        speedup="real",
    )  # fmt: skip

    def score(self, prompt: Prompt) -> Tensor:
        plain_BKS = self.inner.score(prompt)
        weights_HED = prompt.output_weights(self.name)
        values = prompt.values.repeat_interleave(len(weights_HED) // prompt.values.shape[1], dim=1).float()
        # head by head: the outputs of all heads at once would be as large as the hidden states of as many layers
        outputs = [(values[:, h] @ weights_HED[h]).norm(p=1, dim=-1) for h in range(len(weights_HED))]
        weighed = (plain_BKS + self.epsilon) * prompt.per_kv_head(torch.stack(outputs, dim=1))
        chosen = int(prompt.tokens * (1 - self.sparsity) * self.first)
        return weighed.masked_fill(top(plain_BKS, chosen), float("inf")) if chosen else weighed
