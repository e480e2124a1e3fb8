"""TOVA: keep the tokens that the last token attends to.

    score_j = mean over all query heads of A_Sj          the same for every key-value head

The last token itself stays. Nothing else is protected, neither sinks nor recent tokens.

With ``budget`` every head holds that many tokens, as published: at every step the token leaves to which the newest one
attends least, which may be the newest itself. Without it a fraction of the prompt leaves at its end.

Source: M. Oren, M. Hassid, N. Yarden, Y. Adi, R. Schwartz, "Transformers are Multi-State RNNs", EMNLP 2024,
arXiv:2401.06104; official code schwartz-lab-NLP/TOVA; NVIDIA kvpress v0.5.4, which protects the last token.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.methods import BudgetMethod, Descriptor, Prompt, register
from secateur.methods.caching import protect


@register("tova")
@dataclass(frozen=True, kw_only=True)
class TOVA(BudgetMethod):
    """Options of TOVA."""

    descriptor: ClassVar = Descriptor(
        object="kv_cache", granularity="token", when="inference", score="attention", allocation="uniform", data="none",
        speedup="real",
    )  # fmt: skip

    @property
    def protected(self) -> int:
        return 0 if self.budget else 1

    def score(self, prompt: Prompt) -> Tensor:
        seen_BS = prompt.attention(1)[:, :, 0].mean(dim=1)
        seen_BKS = seen_BS[:, None].expand(-1, prompt.keys.shape[1], -1)
        return protect(seen_BKS[..., : prompt.tokens - self.protected], last=self.protected)
