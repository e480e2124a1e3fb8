"""Expected attention: keep the tokens to which future queries are expected to attend, weighted by their values.

Queries before the rotary embedding are taken to be Gaussian, with the mean mu and the covariance C of the prompt's (its
first ``sinks`` left out). R is the mean rotation over the next ``future`` positions. For j behind the sinks:

    e_j     = s (R mu).k_j + s^2 / 2  k_j' (R C R') k_j      log of E[exp(s q.k_j)], s = scaling of the model, 1/sqrt(D)
    a       = softmax(e), mean over the query heads of the group
    score_j = (a_j + epsilon) ||v_j||

Sinks stay. Queries of the prompt alone are looked at, whatever it ends with, so that it suits contexts that are asked
later.

Source: A. Devoto et al., "Expected Attention: KV Cache Compression by Estimating Attention from Future Queries
Distribution", 2025, arXiv:2510.00636; NVIDIA kvpress v0.5.4. Differs from kvpress: queries are turned back instead of
being projected again, in float32, so that every rotary embedding with halves is covered; within ``decoding(...)``,
whose queries are the last ones of the text, none but those of sinks are left out (theirs: the first ones of any); a
soft cap of logits is ignored by both.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.methods import Descriptor, EvictionMethod, Prompt, option, register
from secateur.methods.caching import protect


@register("expected_attention")
@dataclass(frozen=True, kw_only=True)
class ExpectedAttention(EvictionMethod):
    """Options of expected attention; defaults of kvpress."""

    future: int = option(512, "next positions over which the rotation is averaged", unit="tokens", ge=1)
    sinks: int = option(4, "first tokens that stay, and aren't part of the statistics", unit="tokens", ge=0)
    covariance: bool = option(True, "whether the covariance of queries counts, not their mean alone")
    value_norm: bool = option(True, "whether scores are multiplied by the norm of the value")
    epsilon: float = option(0.0, "what is added to the attention before that", ge=0)

    descriptor: ClassVar = Descriptor(
        object="kv_cache", granularity="token", when="inference", score="attention", allocation="uniform", data="none",
        speedup="real",
    )  # fmt: skip

    @property
    def protected(self) -> int:
        return self.sinks

    @property
    def needs_rope(self) -> bool:
        return True

    def score(self, prompt: Prompt) -> Tensor:
        mean_BHE, covariance_BHEE = self._future_queries(prompt)
        keys_BKSE = prompt.keys[:, :, self.sinks :].float()
        # the query heads of a key-value head side by side, so that its keys aren't copied for each
        grouped = (prompt.keys.shape[1], -1)
        expected_BKSG = keys_BKSE @ mean_BHE.unflatten(1, grouped).mT * prompt.scaling
        if self.covariance:
            side_by_side = covariance_BHEE.unflatten(1, grouped).transpose(2, 3).flatten(3)
            spread = (keys_BKSE @ side_by_side).unflatten(3, (-1, keys_BKSE.shape[-1]))
            expected_BKSG += spread.mul_(keys_BKSE[..., None, :]).sum(dim=-1) * prompt.scaling**2 / 2
        score_BKS = expected_BKSG.softmax(dim=2).mean(dim=3)
        if self.value_norm:
            score_BKS = (score_BKS + self.epsilon) * prompt.values[:, :, self.sinks :].float().norm(dim=-1)
        return protect(score_BKS, first=self.sinks)

    def _sinks_among(self, prompt: Prompt) -> int:
        """How many of the queries are those of sinks; while decoding they are the last ones of the text."""
        return self.sinks if prompt.places is None else max(0, self.sinks - int(prompt.positions[0, 0]))

    def _future_queries(self, prompt: Prompt) -> tuple[Tensor, Tensor]:
        queries = prompt.unrotated_queries()[:, :, self._sinks_among(prompt) :]
        mean = queries.mean(dim=2)
        centered = queries - mean[:, :, None]
        covariance = centered.mT @ centered / queries.shape[2]
        if prompt.rope is None:
            return mean, covariance
        start = int(prompt.positions[0, -1]) + 1
        future = torch.arange(start, start + self.future, device=mean.device)
        turn = prompt.rope.mean_rotation(future, mean.shape[-1])
        return mean @ turn.mT, turn @ covariance @ turn.mT
