"""ChunkKV: keep or remove runs of consecutive tokens as a whole, so that what stays can still be read.

    score of a chunk = mean over its tokens of the scores of another method (``of``), summed over heads

The prompt is cut into chunks of ``length`` tokens, the last one perhaps shorter; the max(1, int(chunks (1 - r))) best
stay, the same for every head.

Source: X. Liu et al., "ChunkKV: Semantic-Preserving KV Cache Compression for Efficient Long-Context LLM Inference",
NeurIPS 2025, arXiv:2502.00299; NVIDIA kvpress v0.5.4, which takes the chunks of the first sequence for a whole batch.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.methods import Descriptor, Prompt, WrapperMethod, option, register
from secateur.methods.caching import kept_tokens, top


@register("chunkkv")
@dataclass(frozen=True, kw_only=True)
class ChunkKV(WrapperMethod):
    """Options of ChunkKV; defaults of kvpress."""

    length: int = option(20, "tokens of a chunk", unit="tokens", ge=1)

    descriptor: ClassVar = Descriptor(
        object="kv_cache", granularity="token", when="inference", score="attention", allocation="uniform", data="none",
        speedup="real",
    )  # fmt: skip

    def keep(self, prompt: Prompt) -> Tensor:
        score_BKS = self.score(prompt)
        if prompt.tokens < self.length:
            return top(score_BKS, self.kept(prompt))
        chunks = score_BKS.sum(dim=1).split(self.length, dim=-1)
        chunk_BC = torch.stack([chunk.mean(dim=-1) for chunk in chunks], dim=-1)
        best = top(chunk_BC[:, None], kept_tokens(len(chunks), self.sparsity))
        keep_BS = best[:, 0].repeat_interleave(self.length, dim=-1)[:, : prompt.tokens]
        return keep_BS[:, None].expand_as(score_BKS).clone()
