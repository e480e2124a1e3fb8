"""Random eviction: remove tokens of the prompt from the KV cache by chance.

    score_j = a uniform random number

The baseline that every other method has to beat. All sequences of a batch draw the same numbers, so that a sequence is
cut alike alone and in a batch; layers draw their own.

Source: baseline of NVIDIA kvpress v0.5.4.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.methods import Descriptor, EvictionMethod, Prompt, option, register


@register("random_kv")
@dataclass(frozen=True, kw_only=True)
class RandomKV(EvictionMethod):
    """Options of random eviction."""

    seed: int = option(0, "seed of the random numbers", ge=0)

    local: ClassVar[bool] = True
    reads_values: ClassVar[bool] = False
    descriptor: ClassVar = Descriptor(
        object="kv_cache", granularity="token", when="inference", score="random", allocation="uniform", data="none",
        speedup="real",
    )  # fmt: skip

    def score(self, prompt: Prompt) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + prompt.layer)
        drawn = torch.rand(prompt.keys.shape[1:3], generator=generator)
        return drawn.to(prompt.keys.device).expand(prompt.keys.shape[:3])
