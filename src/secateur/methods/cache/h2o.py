"""H2O: keep the tokens that have received the most attention from all queries, and the most recent ones.

    score_j = mean over the query heads of the group of sum_i A_ij        over all queries i of the prompt

A ``recent`` part of the kept tokens are the last ones; the heavy hitters make up the rest. ``normalized`` divides by
the number of queries that can see a token, S - j, since sums favour early tokens: with ``recent=0`` that is the
ObservedAttention of kvpress. It is the only score here that takes time quadratic in the prompt; attention is computed
some rows at a time, so that memory stays linear.

Source: Z. Zhang et al., "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models", NeurIPS
2023, arXiv:2306.14048; official code FMInference/H2O. Differs from it: scores are those of key-value heads, and tokens
are evicted at the end of the prompt, not at every step after it.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.methods import Descriptor, EvictionMethod, Prompt, option, register
from secateur.methods.caching import protect


@register("h2o")
@dataclass(frozen=True, kw_only=True)
class H2O(EvictionMethod):
    """Options of H2O; half of the budget for heavy hitters and half for recent tokens, as in the paper."""

    recent: float = option(0.5, "fraction of the kept tokens that are the last ones", ge=0, le=1)
    normalized: bool = option(False, "divide by the number of queries that can see a token")

    descriptor: ClassVar = Descriptor(
        object="kv_cache", granularity="token", when="inference", score="attention", allocation="uniform", data="none",
        speedup="real",
    )  # fmt: skip

    def score(self, prompt: Prompt) -> Tensor:
        received_BHS = torch.stack([part.sum(dim=2) for part in prompt.attention_in_parts()]).sum(dim=0)
        if self.normalized:
            received_BHS = received_BHS / torch.arange(prompt.tokens, 0, -1, device=received_BHS.device)
        score_BKS = prompt.per_kv_head(received_BHS)
        last = int(self.kept(prompt) * self.recent)
        return protect(score_BKS[..., : prompt.tokens - last], last=last)
