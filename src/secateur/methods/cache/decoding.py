"""Decoding: hold a number of tokens while the model writes, by the scores of another method.

    every ``every`` tokens:  the ``budget`` best of the tokens that are left stay, in every head

The prompt stays as it is, unless ``sparsity`` says otherwise. Scores that look at queries see the last ``queries`` ones
of the text, also those from before the last eviction. So a cache never holds more than ``budget`` + ``every`` tokens
once the prompt is behind it. Methods whose published form does this at every step have a ``budget`` of their own:
``h2o``, ``tova`` and ``streaming_llm``.

Source: ``DecodingPress`` and, with ``sparsity``, ``PrefillDecodingPress`` of NVIDIA kvpress v0.5.4. Differs from it:
queries are those that the model computed, where kvpress projects buffered hidden states again and turns all of them by
the last position; they go on over an eviction, where kvpress begins anew; a prompt longer than ``budget`` is cut
after the first ``every`` tokens in both.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from secateur.errors import OptionError
from secateur.methods import Descriptor, Prompt, WrapperMethod, option, register


@register("decoding")
@dataclass(frozen=True, kw_only=True)
class Decoding(WrapperMethod):
    """Options of budgets while decoding; defaults of kvpress."""

    sparsity: float = option(0.0, "fraction of the prompt's tokens removed at its end", ge=0, lt=1)
    budget: int = option(2048, "tokens that every head keeps while decoding", unit="tokens", ge=1)
    every: int = option(512, "tokens of the text from one eviction to the next", unit="tokens", ge=1)
    queries: int = option(256, "last queries that scores are taken from", unit="tokens", ge=1)

    again: ClassVar[bool] = False
    descriptor: ClassVar = Descriptor(
        object="kv_cache", granularity="token", when="inference", score="attention", allocation="uniform", data="none",
        speedup="real",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.inner.again:
            raise OptionError(
                f"{self.name}: of must be a method whose heads keep equally many tokens of whatever is left, got"
                f" '{self.of}'"
            )
        if self.budget <= self.inner.protected:
            raise OptionError(
                f"{self.name}: budget must be more than the {self.inner.protected} tokens that {self.of} protects, got"
                f" {self.budget}"
            )

    @property
    def is_identity(self) -> bool:
        return False

    @property
    def protected(self) -> int:
        return self.inner.protected if self.sparsity else 0

    @property
    def remembered(self) -> int:
        return 0 if self.inner.local else self.queries

    def keep(self, prompt: Prompt) -> Tensor:
        return self.inner.keep(prompt) if self.sparsity else self._all(prompt)

    def keep_again(self, left: Prompt) -> Tensor:
        if left.tokens <= self.budget:
            return self._all(left)
        return replace(self.inner, sparsity=1 - self.budget / left.tokens).keep(left)

    def _all(self, prompt: Prompt) -> Tensor:
        return torch.ones(prompt.keys.shape[:3], dtype=torch.bool, device=prompt.keys.device)
