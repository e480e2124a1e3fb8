"""SnapKV: keep the tokens that the end of the prompt attends to, and their neighbours.

    a_j     = mean over the last w queries i of A_ij         softmax over all keys, j before the window
    score_j = mean over the query heads of the group of pool(a)_j

The window itself stays. Pooling over ``kernel`` neighbours keeps pieces of text together; at both ends the average
counts zeros of the padding, as the official code does. What the end of the prompt asks decides what stays, so that the
question should stand there; for a context that is asked later, take a method that looks at keys.

Source: Y. Li et al., "SnapKV: LLM Knows What You Are Looking for Before Generation", NeurIPS 2024, arXiv:2404.14469;
official code FasterDecoding/SnapKV; NVIDIA kvpress v0.5.4, whose defaults these are (the official code sums over the
window, which ranks alike, and has scores for query heads; ThinK's runs use window 32, kernel 7, max).
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from secateur.errors import OptionError
from secateur.methods import Descriptor, EvictionMethod, Prompt, option, register
from secateur.methods.caching import protect


@dataclass(frozen=True, kw_only=True)
class Snap(EvictionMethod):
    """Scores by the attention of a window at the end of the prompt; options and defaults of SnapKV."""

    window: int = option(64, "last queries whose attention is looked at; their tokens stay", unit="tokens", ge=1)
    kernel: int = option(5, "neighbours over which scores are pooled, an odd number", unit="tokens", ge=1)
    pooling: str = option("avg", "how scores are pooled", choices=("avg", "max"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kernel % 2 == 0:
            raise OptionError(f"{self.name}: kernel must be odd, so that it has a middle, got {self.kernel}")

    @property
    def protected(self) -> int:
        return self.window

    def score(self, prompt: Prompt) -> Tensor:
        seen_BHS = prompt.attention(self.window)[..., : -self.window].mean(dim=2)
        pool = F.avg_pool1d if self.pooling == "avg" else F.max_pool1d
        pooled_BHS = pool(seen_BHS, self.kernel, stride=1, padding=self.kernel // 2)
        return protect(prompt.per_kv_head(pooled_BHS), last=self.window)


@register("snapkv")
@dataclass(frozen=True, kw_only=True)
class SnapKV(Snap):
    """Options of SnapKV; defaults of kvpress."""

    descriptor: ClassVar = Descriptor(
        object="kv_cache", granularity="token", when="inference", score="attention", allocation="uniform", data="none",
        speedup="real",
    )  # fmt: skip
