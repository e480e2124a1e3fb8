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
        sure = top(plain_BKS, int(prompt.tokens * (1 - self.sparsity) * self.first))
        # what stays in any case needn't be weighed, and that is most of the time
        rest = ~sure
        shape = (*plain_BKS.shape[:2], -1)
        values_BKRE = prompt.values[rest].view(*shape, prompt.values.shape[-1]).float()
        weights_HED = prompt.output_weights(self.name)
        group = len(weights_HED) // values_BKRE.shape[1]
        outputs = [_lengths(values_BKRE[:, h // group], weight) for h, weight in enumerate(weights_HED)]
        weighed_BKR = (plain_BKS[rest].view(shape) + self.epsilon) * prompt.per_kv_head(torch.stack(outputs, dim=1))
        return torch.full_like(plain_BKS, float("inf")).masked_scatter(rest, weighed_BKR)


def _lengths(values_BRE: Tensor, weight_ED: Tensor, rows: int = 512) -> Tensor:
    """The L1 norm of what every token adds to the hidden states through one head, [B, R].

    Some rows at a time, which stay in the cache of a processor; in place, which takes half the time of norm(p=1).
    """
    return torch.cat([(part @ weight_ED).abs_().sum(dim=-1) for part in values_BRE.split(rows, dim=1)], dim=-1)
