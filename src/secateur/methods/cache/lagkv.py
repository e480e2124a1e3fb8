"""LagKV: keep the tokens that stand out when measured by what comes after them.

Behind the sinks, tokens are cut into partitions of ``lag``. Partition p is scaled by the minimum and maximum of every
channel in partition p + 1:

    u       = (x - min) / (max - min)
    s       = softmax over the partition of the standard deviation over channels of u;  mean of keys and values
    score_j = rank of s_j inside the partition / lag              (``cross`` leaves s as it is)

Sinks, the last whole partition and what is behind it get 1. Prompts shorter than sinks + 2 lag keep their last tokens.

Source: M. Liang et al., "LagKV: Lag-Relative Information of the KV Cache Tells Which Tokens Are Important", 2025,
arXiv:2504.04704; NVIDIA kvpress v0.5.4. Differs from it: a channel that is constant in a partition counts 0, where
kvpress divides by zero; of equal scores the last tokens stay.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.methods import Descriptor, EvictionMethod, Prompt, option, register


@register("lagkv")
@dataclass(frozen=True, kw_only=True)
class LagKV(EvictionMethod):
    """Options of LagKV; defaults of kvpress."""

    sinks: int = option(4, "first tokens that stay", unit="tokens", ge=0)
    lag: int = option(128, "tokens of a partition", unit="tokens", ge=1)
    cross: bool = option(False, "compare scores across partitions, not ranks within each; for adakv")

    descriptor: ClassVar = Descriptor(
        object="kv_cache", granularity="token", when="inference", score="similarity", allocation="uniform",
        data="none", speedup="real",
    )  # fmt: skip

    def score(self, prompt: Prompt) -> Tensor:
        behind = prompt.tokens - self.sinks
        score = torch.ones(prompt.keys.shape[:3], device=prompt.keys.device)
        if behind < 2 * self.lag:
            if behind > 0:
                score[..., self.sinks :] = torch.arange(behind, device=score.device) / behind
            return score
        whole = slice(self.sinks, self.sinks + behind // self.lag * self.lag)
        sides = [side[:, :, whole].float().unflatten(2, (-1, self.lag)) for side in (prompt.keys, prompt.values)]
        own_BKPL = (_spread(sides[0]) + _spread(sides[1])) / 2
        if not self.cross:
            own_BKPL = own_BKPL.argsort(dim=-1).argsort(dim=-1) / self.lag
        score[..., self.sinks : whole.stop - self.lag] = own_BKPL.flatten(2)
        return score


def _spread(x_BKPLE: Tensor) -> Tensor:
    """How much the scaled channels of a token differ, as a softmax over its partition, [B, K, P - 1, L]."""
    later = x_BKPLE[:, :, 1:]
    low, high = later.amin(dim=-2, keepdim=True), later.amax(dim=-2, keepdim=True)
    scaled = torch.where(high > low, (x_BKPLE[:, :, :-1] - low) / (high - low), 0.0)
    return scaled.std(dim=-1).softmax(dim=-1)
