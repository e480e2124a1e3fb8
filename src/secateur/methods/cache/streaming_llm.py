"""StreamingLLM: keep the first and the most recent tokens in the KV cache.

The first tokens are attention sinks: whatever they say, heads put there what they have to put somewhere. Without them a
model breaks down; with them and a recent window it stays fluent, though it knows nothing of what lies between.

    score_j = 0 for n_sink <= j < n_sink + S - n_kept, else 1

With ``budget`` every head holds that many tokens, as published: ``sinks`` and the most recent ones, while the model
decodes too. Without it a fraction of the prompt leaves at its end.

Keys keep the rotation of their position in the text. The paper gives kept tokens new positions without gaps:
``key_rerotation(streaming_llm:0.5)``, and ``key_rerotation(streaming_llm:budget=1024)`` is the published whole.

Source: G. Xiao, Y. Tian, B. Chen, S. Han, M. Lewis, "Efficient Streaming Language Models with Attention Sinks", ICLR
2024, arXiv:2309.17453; official code mit-han-lab/streaming-llm; NVIDIA kvpress v0.5.4.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.errors import OptionError
from secateur.methods import BudgetMethod, Descriptor, Prompt, option, register


@register("streaming_llm")
@dataclass(frozen=True, kw_only=True)
class StreamingLLM(BudgetMethod):
    """Options of StreamingLLM; defaults of the paper."""

    sinks: int = option(4, "first tokens that stay", unit="tokens", ge=0)

    descriptor: ClassVar = Descriptor(
        object="kv_cache", granularity="token", when="inference", score="position", allocation="uniform", data="none",
        speedup="real",
    )  # fmt: skip

    @property
    def protected(self) -> int:
        return 0 if self.budget else self.sinks

    def __post_init__(self) -> None:
        super().__post_init__()
        if 0 < self.budget <= self.sinks:
            raise OptionError(f"{self.name}: budget must be more than the {self.sinks} sinks, got {self.budget}")

    def score(self, prompt: Prompt) -> Tensor:
        score = torch.ones(prompt.keys.shape[:3], device=prompt.keys.device)
        score[..., self.sinks : self.sinks + prompt.tokens - self.kept(prompt)] = 0
        return score
