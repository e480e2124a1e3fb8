"""Block by block: go through the prompt once, and let what was kept so far compete with the next tokens.

The first n tokens are the candidates; with every block of ``length`` tokens that follows, candidates and block are
scored together by another method (``of``) and the best n stay. That is how KeyDiff is published: memory stays that of
the budget while a prompt is read.

Scores must depend on keys and values alone (``knorm``, ``keydiff``, ``random_kv``).

Source: J. Park et al., "KeyDiff", 2025, arXiv:2504.15364; ``BlockPress`` of NVIDIA kvpress v0.5.4.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from secateur.errors import OptionError
from secateur.methods import Descriptor, Prompt, WrapperMethod, option, register
from secateur.methods.caching import top


@register("block_kv")
@dataclass(frozen=True, kw_only=True)
class BlockKV(WrapperMethod):
    """Options of the eviction by blocks; the block length of KeyDiff."""

    of: str = option("keydiff", "method that gives the scores, with its options")
    length: int = option(128, "tokens that are added at a time", unit="tokens", ge=1)

    descriptor: ClassVar = Descriptor(
        object="kv_cache", granularity="token", when="inference", score="similarity", allocation="uniform",
        data="none", speedup="real",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.inner.local:
            raise OptionError(
                f"{self.name}: of must be a method that looks at keys and values alone, such as keydiff or knorm, got"
                f" '{self.of}'"
            )

    def keep(self, prompt: Prompt) -> Tensor:
        count, (batch, heads) = self.kept(prompt), prompt.keys.shape[:2]
        whole = torch.arange(prompt.tokens, device=prompt.keys.device).expand(batch, heads, -1)
        kept = whole[..., :count]
        for start in range(count, prompt.tokens, self.length):
            candidates = torch.cat([kept, whole[..., start : start + self.length]], dim=-1)
            chosen = top(self.score(_only(prompt, candidates, values=self.inner.reads_values)), count)
            kept = candidates[chosen].view(batch, heads, count)
        return torch.zeros_like(whole, dtype=torch.bool).scatter(-1, kept, True)


def _only(prompt: Prompt, tokens_BKC: Tensor, *, values: bool) -> Prompt:
    """The prompt with these tokens of every head; without ``values`` those stay what they were."""
    batch, heads, tokens = prompt.keys.shape[:3]
    # whole rows are copied at a time, which gathering element by element doesn't do
    first = torch.arange(batch * heads, device=tokens_BKC.device).view(batch, heads, 1) * tokens
    rows = (first + tokens_BKC).flatten()
    shape = (batch, heads, tokens_BKC.shape[-1], -1)
    sides = {
        name: side.reshape(batch * heads * tokens, -1).index_select(0, rows).view(shape)
        for name, side in (("keys", prompt.keys), *([("values", prompt.values)] if values else []))
    }
    return replace(prompt, **sides)
