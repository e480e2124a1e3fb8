"""H2O: keep the tokens that have received the most attention from all queries, and the most recent ones.

    score_j = mean over the query heads of the group of sum_i A_ij        over all queries i of the prompt

A ``recent`` part of the kept tokens are the last ones; the heavy hitters make up the rest. ``normalized`` divides by
the number of queries that can see a token, S - j, since sums favour early tokens: with ``recent=0`` that is the
ObservedAttention of kvpress. It is the only score here that takes time quadratic in the prompt; attention is computed
some rows at a time, so that memory stays linear.

With ``budget`` every head holds that many tokens, as published: sums go on while the model decodes, those of the tokens
that stay are carried, and at every step the lowest one that isn't recent leaves (``budget`` = hh_size + recent_size of
the official code). Without it a fraction of the prompt leaves at its end, and what follows stays.

Source: Z. Zhang et al., "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models", NeurIPS
2023, arXiv:2306.14048; official code FMInference/H2O. Differs from it: scores are those of key-value heads (theirs: of
query heads, for which keys are repeated), and sequences of a batch don't add up.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from secateur.methods import BudgetMethod, Descriptor, Prompt, option, register
from secateur.methods.caching import protect


@register("h2o")
@dataclass(frozen=True, kw_only=True)
class H2O(BudgetMethod):
    """Options of H2O; half of the budget for heavy hitters and half for recent tokens, as in the paper."""

    recent: float = option(0.5, "fraction of the kept tokens that are the last ones", ge=0, le=1)
    normalized: bool = option(False, "divide by the number of queries that can see a token")

    descriptor: ClassVar = Descriptor(
        object="kv_cache", granularity="token", when="inference", score="attention", allocation="uniform", data="none",
        speedup="real",
    )  # fmt: skip

    @property
    def sums(self) -> bool:
        return True

    def carry(self, read: Prompt) -> Tensor:
        """Attention that every token has received, of the mean query head of its group."""
        received_BHS = torch.stack([part.sum(dim=2) for part in read.attention_in_parts()]).sum(dim=0)
        received_BKS = read.per_kv_head(received_BHS)
        if read.carried is None:
            return received_BKS
        return received_BKS + F.pad(read.carried, (0, read.tokens - read.carried.shape[-1]))

    def score(self, prompt: Prompt) -> Tensor:
        score_BKS = self.carry(prompt) if prompt.carried is None else prompt.carried
        if self.normalized:
            score_BKS = score_BKS / prompt.ages()
        last = int(self.kept(prompt) * self.recent)
        return protect(score_BKS[..., : prompt.tokens - last], last=last)
