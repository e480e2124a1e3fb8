"""Tasks of lm-eval whose answers are written behind a compressed prompt, such as those of LongBench.

    lm_eval:longbench_qasper?limit=20

The question is part of the prompt, and so of what is compressed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from secateur.cache.compressed import compress_cache
from secateur.cachestudy.measuring import DENSE, Item, Measurement, Protocol
from secateur.errors import UsageError
from secateur.evaluation.base import Settings
from secateur.evaluation.lm_eval_task import LmEval

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_KIND = "lm_eval:"


@dataclass(frozen=True)
class Answering(Item):
    """A task with all its items; bytes are those of the last prompt."""

    name: str
    task: LmEval
    seed: int

    def opened(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Callable[[str], Measurement]:
        def measured(spec: str) -> Measurement:
            whole = "knorm:0" if spec == DENSE else spec
            with compress_cache(model, whole, tokenizer=tokenizer) as made:
                metrics = self.task.measure({"model": model}, tokenizer, Settings(seed=self.seed))
            report = made.report()
            sizes = {name: report[name] for name in ("bytes_dense", "bytes_held", "bytes_ideal")}
            return Measurement(self.name, spec, **sizes, scores={m.name: m.values["model"] for m in metrics})

        return measured


def answerings(asked: Protocol) -> Iterator[Answering]:
    """Every task. Raises UsageError, DataError for one that can't be loaded, and MissingExtraError."""
    for text in dict.fromkeys(asked.tasks):
        if not text.startswith(_KIND):
            raise UsageError(f"tasks are {_KIND}TASK, whose answers are written behind the cache, got '{text}'")
        task = LmEval.parse(text.removeprefix(_KIND))
        task.check_written()
        yield Answering(text, task, asked.seed)
