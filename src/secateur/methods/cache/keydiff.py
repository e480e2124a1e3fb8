"""KeyDiff: keep the tokens whose keys point away from the others.

    c       = mean_j k_j / ||k_j||
    score_j = -cos(k_j, c)

Ranks as the full pairwise comparison -sum_i cos(k_i, k_j) does, without comparing pairs. Lengths of keys don't matter,
and no query is looked at. The paper goes through the prompt block by block: ``block_kv(keydiff:0.5)``.

Source: J. Park et al., "KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference in
Resource-Constrained Environments", 2025, arXiv:2504.15364; NVIDIA kvpress v0.5.4.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from secateur.methods import Descriptor, EvictionMethod, Prompt, register


@register("keydiff")
@dataclass(frozen=True, kw_only=True)
class KeyDiff(EvictionMethod):
    """Options of KeyDiff."""

    local: ClassVar[bool] = True
    reads_values: ClassVar[bool] = False
    descriptor: ClassVar = Descriptor(
        object="kv_cache", granularity="token", when="inference", score="similarity", allocation="uniform",
        data="none", speedup="real",
    )  # fmt: skip

    def score(self, prompt: Prompt) -> Tensor:
        keys = prompt.keys.float()
        # keys of length 1 are never written: what is divided by their lengths is a number for every key
        inverse_BK1S = keys.norm(dim=-1).clamp_min(1e-12).reciprocal()[..., None, :]
        anchor_BK1E = F.normalize(inverse_BK1S @ keys / prompt.tokens, dim=-1, eps=1e-8)
        return -((anchor_BK1E @ keys.mT) * inverse_BK1S)[..., 0, :]
