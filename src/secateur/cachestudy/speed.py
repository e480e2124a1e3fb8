"""How fast a model reads a prompt and writes behind it, with every cache in turn, over the length of the prompt.

Repeats are interleaved over the caches, so that a machine that slows down or warms up meets all of them alike. Dense is
transformers' own cache. What it costs to compress is part of reading the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from secateur import timing
from secateur.cache.compressed import compressed_cache
from secateur.cache.sizes import cache_shape
from secateur.cachestudy.measuring import DENSE, Item, Measurement, Protocol
from secateur.observe.calibration import cached_forward, check_length

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Timed(Item):
    """One repeat: a prompt of ``tokens`` random tokens is read, and ``new`` are written behind it.

    ``warm`` are the specs that have run at this length before; those that haven't run once without being timed.
    """

    name: str
    tokens: int
    new: int
    seed: int
    warm: set[str] = field(default_factory=set, compare=False)

    def opened(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Callable[[str], Measurement]:
        def measured(spec: str) -> Measurement:
            if spec not in self.warm:
                self._run(model, tokenizer, spec)
                self.warm.add(spec)
            return self._run(model, tokenizer, spec)

        return measured

    @torch.no_grad()
    def _run(self, model: PreTrainedModel, tokenizer: Any, spec: str) -> Measurement:
        device = model.device
        generator = torch.Generator().manual_seed(self.seed)
        prompt_BT = torch.randint(model.config.get_text_config().vocab_size, (1, self.tokens), generator=generator)
        prompt_BT = prompt_BT.to(device)
        cache: Any = None if spec == DENSE else compressed_cache(spec, model, tokenizer=tokenizer)
        start = timing.now(device)
        logits_BV, cache = cached_forward(model, prompt_BT, cache)
        read = timing.now(device) - start
        dense = cache_shape(model).dense_bytes(self.tokens)
        names = ("bytes_dense", "bytes_held", "bytes_ideal")
        report = None if spec == DENSE else cache.report()
        sizes: dict[str, Any] = {name: dense if report is None else report[name] for name in names}
        start = timing.now(device)
        for _ in range(self.new):
            logits_BV, cache = cached_forward(model, logits_BV.argmax(dim=-1, keepdim=True), cache)
        written = timing.now(device) - start
        return Measurement(
            self.name,
            spec,
            **sizes,
            length=self.tokens,
            prefill=self.tokens / read,
            decode=self.new / written,
        )


def timings(model: PreTrainedModel, asked: Protocol) -> Iterator[Timed]:
    """Every repeat at every length. Raises UsageError for prompts that are longer than the model's positions."""
    for tokens in dict.fromkeys(asked.speed):
        check_length(model, tokens + asked.new, f"a prompt of {tokens} with {asked.new} new tokens")
        warm: set[str] = set()
        for repeat in range(asked.repeats):
            # seconds of other numbers of threads are others
            how = f"new={asked.new} threads={torch.get_num_threads()}"
            yield Timed(f"speed {tokens} {how} repeat {repeat}", tokens, asked.new, asked.seed, warm)
