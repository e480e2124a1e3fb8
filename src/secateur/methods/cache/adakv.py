"""AdaKV: let the key-value heads of a layer share one budget, so that heads with spread attention keep more.

Another method (``of``) scores the tokens. Of K heads that would keep n tokens each, every head is sure of its
int(n ``safeguard``) best; then the K (S - n) lowest scores over heads and tokens leave. Heads keep different numbers of
tokens, which are stored as such: the bytes are those of the budget.

Source: Y. Feng et al., "Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM
Inference", NeurIPS 2025, arXiv:2407.11550; NVIDIA kvpress v0.5.4, which hides the keys instead of removing them.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.methods import Descriptor, Prompt, WrapperMethod, option, register
from secateur.methods.caching import top


@register("adakv")
@dataclass(frozen=True, kw_only=True)
class AdaKV(WrapperMethod):
    """Options of AdaKV; defaults of kvpress."""

    safeguard: float = option(0.2, "fraction of its even share that every head keeps for sure", ge=0, le=1)

    again: ClassVar[bool] = False
    descriptor: ClassVar = Descriptor(
        object="kv_cache", granularity="token", when="inference", score="attention", allocation="by_head", data="none",
        speedup="memory_only",
    )  # fmt: skip

    def keep(self, prompt: Prompt) -> Tensor:
        score_BKS = self.score(prompt)
        heads, even = score_BKS.shape[1], self.kept(prompt)
        safe = int(even * self.safeguard)
        if safe:
            score_BKS = score_BKS.masked_fill(top(score_BKS, safe), float("inf"))
        # token by token, so that of equal scores every head keeps its last tokens
        by_token = score_BKS.mT.flatten(1)[:, None]
        return top(by_token, heads * even)[:, 0].unflatten(1, (-1, heads)).mT
