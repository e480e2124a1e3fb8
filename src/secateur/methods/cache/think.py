"""ThinK: remove the channels of keys that the queries at the end of the prompt hardly use.

A channel adds the outer product Q[:,d] K[:,d]' to the logits, whose Frobenius norm is ||Q[:,d]|| ||K[:,d]||:

    score_d = mean over the group and the last w queries of Q_d^2 * mean over keys of K_d^2

The floor(D r) lowest channels of every key-value head leave, for all tokens but the ``recent`` ones and those that
follow. Queries lose the same channels when they meet thin keys; logits are still divided by sqrt(D). Behind an eviction
the keys that were not evicted count. With ``target=value``: score_d = mean over values of V_d^2 (the paper's appendix),
which is fragile beyond about 30 %.

Source: Y. Xu et al., "ThinK: Thinner Key Cache by Query-Driven Pruning", ICLR 2025, arXiv:2407.21018; official code
SalesforceAIResearch/ThinK; NVIDIA kvpress v0.5.4, reviewed by the first author. Differs from the official code: scores
are those of key-value heads, as in kvpress (theirs: of query heads, for which keys are repeated), in float32.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.methods import CacheChannelMethod, Descriptor, Prompt, option, register


@register("think")
@dataclass(frozen=True, kw_only=True)
class ThinK(CacheChannelMethod):
    """Options of ThinK; defaults of the paper."""

    window: int = option(32, "last queries of the prompt that are looked at", unit="tokens", ge=1)

    descriptor: ClassVar = Descriptor(
        object="kv_cache", granularity="channel", when="inference", score="activation", allocation="uniform",
        data="none", speedup="memory_only",
    )  # fmt: skip

    def channel_score(self, prompt: Prompt) -> Tensor:
        if self.target == "value":
            return prompt.values.float().square().mean(dim=2)
        queries_BHE = prompt.queries[:, :, -self.window :].float().square().mean(dim=2)
        return prompt.per_kv_head(queries_BHE) * prompt.keys.float().square().mean(dim=2)
