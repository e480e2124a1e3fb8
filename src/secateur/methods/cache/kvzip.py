"""KVzip: keep what the model needs to repeat its prompt, in whatever layers and heads that is.

Behind the prompt the model reads it once more, passage by passage of ``chunk`` tokens, behind the request to repeat it
("Repeat the previous context exactly."; later passages: "Repeat the part of the previous context exactly, starting
with", and the last 8 tokens of the passage before). What is read for this isn't kept. For the tokens j of a passage,
and the queries i of what is read:

    A_ij    = softmax over the sinks, the passage in the cache and what is read (causal) of the scaled q_i.k_j
    score_j = max over i and over the query heads of the group of A_ij
    plus:     A_ij ||W_o v_j|| / ||h_i|| before the maximum          (KVzip+), h_i the input of the attention

The first ``sinks`` tokens stay: set them to the length of the system prompt, which isn't repeated. One threshold for
all layers and heads (``share=model``) lets each keep as many tokens as it needs; ``layer`` and ``head`` give equal
parts. With ``level=head`` a key-value head keeps all tokens or the sinks alone, by its best score. No question is
looked at, so that one compressed prompt serves many. Reading again takes two to three times as long as reading.

Source: J.-H. Kim et al., "KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction", NeurIPS 2025,
arXiv:2505.23416; official code snu-mllab/KVzip (passages of 2000 tokens); NVIDIA kvpress v0.5.4 (2048; KVzip+). Differs
from both: scores are float32, the number kept is exact, and of equal scores the last tokens stay. kvpress hides what
is evicted, and gives 0 to what a chat template puts in front of the prompt, so that this leaves first. Head scores of
the official code were found before, on other texts; here they are those of this prompt.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.allocate import part_of
from secateur.methods import Descriptor, Prompt, RereadMethod, option, register
from secateur.methods.caching import kept_tokens, top
from secateur.methods.rereading import Passage, Reader, passages, reconstruction_scores


@register("kvzip")
@dataclass(frozen=True, kw_only=True)
class KVzip(RereadMethod):
    """Options of KVzip; defaults of kvpress."""

    chunk: int = option(2048, "tokens of the prompt that are repeated at a time", unit="tokens", ge=1)
    sinks: int = option(4, "first tokens that stay and aren't repeated", unit="tokens", ge=0)
    share: str = option("model", "what shares one budget", choices=("model", "layer", "head"))
    level: str = option("pair", "what leaves: pairs of token and head, or whole heads", choices=("pair", "head"))
    plus: bool = option(False, "weigh attention by what the value adds to the hidden state that asks (KVzip+)")

    descriptor: ClassVar = Descriptor(
        object="kv_cache", granularity="token", when="inference", score="attention", allocation="global", data="none",
        speedup="memory_only",
    )  # fmt: skip

    @property
    def protected(self) -> int:
        return self.sinks

    def passages(self, text: Tensor, tokenizer: Reader) -> list[Passage]:
        return passages(text, tokenizer, first=self.sinks, chunk=self.chunk)

    def reread(self, read: Prompt, passage: slice) -> Tensor:
        return reconstruction_scores(read, passage, self.name if self.plus else None)

    def keep_of_all(self, scores: list[Tensor]) -> list[Tensor]:
        score_LKS = torch.stack([score.to(scores[0].device) for score in scores])
        keep = self._heads(score_LKS) if self.level == "head" else self._pairs(score_LKS)
        keep[..., : self.sinks] = True
        return list(keep)

    def _heads(self, score_LKS: Tensor) -> Tensor:
        best_LK = score_LKS[..., self.sinks :].amax(dim=-1)
        whole = top(best_LK.view(1, 1, -1), part_of(best_LK.numel(), 1 - self.sparsity))
        return whole.view(*best_LK.shape, 1).repeat(1, 1, score_LKS.shape[-1])

    def _pairs(self, score_LKS: Tensor) -> Tensor:
        layers, heads, tokens = score_LKS.shape
        rows = {"model": 1, "layer": layers, "head": layers * heads}[self.share]
        shared = score_LKS.clone()
        shared[..., : self.sinks] = float("inf")
        # token by token, so that of equal scores all heads keep their last tokens
        flat = shared.view(rows, -1, tokens).mT.flatten(1)
        chosen = top(flat[:, None], kept_tokens(flat.shape[1], self.sparsity))[:, 0]
        return chosen.view(rows, tokens, -1).mT.reshape(score_LKS.shape).clone()
