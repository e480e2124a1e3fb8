"""How long a language model takes over a request: reading a prompt, and writing new tokens with the KV cache.

This is the latency that a budget of latency is about. Models take turns, and the medians of reading the prompt and of
writing a token make the request.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING

import torch

from secateur import timing
from secateur.errors import OptionError, UsageError
from secateur.evaluation.base import Settings
from secateur.models.latency import request_milliseconds, request_works
from secateur.observe.calibration import check_length, evaluating
from secateur.report import Metric
from secateur.timing import Workload

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

REPEATS = 5


@dataclass(frozen=True)
class Request:
    """``request`` or ``request:batch=1,prompt=256,new=32,repeats=5``: sequences, prompt tokens, new tokens, repeats."""

    workload: Workload = field(default_factory=Workload)
    repeats: int = REPEATS

    @classmethod
    def parse(cls, argument: str) -> Request:
        """From the text after ``request:``. Raises UsageError for an unknown key or a bad number."""
        parts = argument.split(",") if argument else []
        repeats = [part.partition("=")[2].strip() for part in parts if part.partition("=")[0].strip() == "repeats"]
        rest = ",".join(part for part in parts if part.partition("=")[0].strip() != "repeats")
        try:
            workload = Workload.parse(rest)
        except OptionError as error:
            raise UsageError(f"request: {error}; and there may be repeats") from None
        if repeats and not (repeats[0].isdecimal() and int(repeats[0]) >= 1):
            raise UsageError(f"request: repeats must be a whole number of at least 1, got {repeats[0]!r}")
        return cls(workload, int(repeats[0]) if repeats else REPEATS)

    @property
    def name(self) -> str:
        """The task with its settings."""
        return f"request:{self.workload},repeats={self.repeats}"

    def check(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, settings: Settings) -> None:
        check_length(model, self.workload.prompt + self.workload.new, self.name)

    def measure(
        self, models: Mapping[str, PreTrainedModel], tokenizer: PreTrainedTokenizerBase | None, settings: Settings
    ) -> list[Metric]:
        """One metric, in milliseconds."""
        load = self.workload
        works, devices = {}, {}
        for name, model in models.items():
            self.check(model, tokenizer, settings)
            for part, work in request_works(model, load, every=True).items():
                works[f"{name}/{part}"] = _in_evaluation(model, work)
                devices[f"{name}/{part}"] = model.device

        def step(done: int) -> None:
            settings.progress(self.name, done, self.repeats + 1)

        with torch.inference_mode(), timing.watched() as machine:
            taken = timing.take_turns(works, self.repeats, devices, step)
        medians = {name: 1000 * median(seconds) for name, seconds in taken.items()}
        values = {name: request_milliseconds(medians, f"{name}/", load, load.new) for name in models}
        rounds = [{name: 1000 * taken[name][number] for name in taken} for number in range(self.repeats)]
        repeats = {n: [request_milliseconds(one, f"{n}/", load, load.new) for one in rounds] for n in models}
        how = (
            f"batch {load.batch}, {load.prompt} prompt tokens, {load.new} new tokens with the KV cache, median of"
            f" {self.repeats} interleaved repeats, {torch.get_num_threads()} threads{machine.about}"
            f"{timing.PAIRED if len(models) > 1 else ''}"
        )
        return [Metric("latency of a request", "ms", values, False, how, repeats=repeats)]


def _in_evaluation(model: PreTrainedModel, work: object):
    def done() -> None:
        with evaluating(model):
            work()  # type: ignore[operator]

    return done
