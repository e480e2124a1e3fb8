"""Key norm: remove the tokens with the longest keys from the KV cache.

    score_j = -||k_j||_2

Short keys tend to receive much attention, so that neither queries nor attention are looked at.

Source: A. Devoto, Y. Zhao, S. Scardapane, P. Minervini, "A Simple and Effective L2 Norm-Based Strategy for KV Cache
Compression", EMNLP 2024, arXiv:2406.11430; NVIDIA kvpress v0.5.4.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.methods import Descriptor, EvictionMethod, Prompt, register


@register("knorm")
@dataclass(frozen=True, kw_only=True)
class KeyNorm(EvictionMethod):
    """Options of key norm."""

    local: ClassVar[bool] = True
    reads_values: ClassVar[bool] = False
    descriptor: ClassVar = Descriptor(
        object="kv_cache", granularity="token", when="inference", score="magnitude", allocation="uniform", data="none",
        speedup="real",
    )  # fmt: skip

    def score(self, prompt: Prompt) -> Tensor:
        return -prompt.keys.float().norm(dim=-1)
