"""PyramidKV: SnapKV's scores with more tokens in the first layers and fewer in the last.

Attention spreads widely in the first layers and gathers on few tokens in the last. With c = S (1 - r), window w and L
layers numbered from 0:

    low = c / beta, high = 2 c - low;  if high >= S - w: high = S - w, low = 2 c - high
    n(l) = round(high - l (high - low) / (L - 1))

Where S >= high >= low >= w doesn't hold, every layer keeps round(c).

Source: Z. Cai et al., "PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling",
arXiv:2406.02069; official code Zefan-Cai/KVCache-Factory; budgets of NVIDIA kvpress v0.5.4.
"""

from dataclasses import dataclass
from typing import ClassVar

from secateur.methods import Descriptor, Prompt, option, register
from secateur.methods.cache.snapkv import Snap


@register("pyramidkv")
@dataclass(frozen=True, kw_only=True)
class PyramidKV(Snap):
    """Options of PyramidKV; defaults of kvpress."""

    beta: int = option(20, "how steep the pyramid is: the last layer keeps at least 1 / beta of the mean", ge=1)

    descriptor: ClassVar = Descriptor(
        object="kv_cache", granularity="token", when="inference", score="attention", allocation="by_layer",
        data="none", speedup="real",
    )  # fmt: skip

    def kept(self, prompt: Prompt) -> int:
        tokens, mean = prompt.tokens, prompt.tokens * (1 - self.sparsity)
        low = mean / self.beta
        high = 2 * mean - low
        if high >= tokens - self.window:
            high = tokens - self.window
            low = 2 * mean - high
        if not tokens >= high >= low >= self.window:
            return max(1, round(mean))
        return round(high - prompt.layer * (high - low) / max(1, prompt.layers - 1))
