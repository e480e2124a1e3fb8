"""How long one call takes, and how many multiply-accumulates it is.

    latency                        median of 20 repeats on the example inputs
    latency:batch=8,repeats=50     the example inputs repeated or cut to 8 along their first dimension
    latency:threads=2              on 2 threads of the processor

Repeats are interleaved over the models (dense, pruned, dense, pruned, ...), so that a machine that slows down or warms
up meets all of them alike; a change is the median of the ratios of each repeat. MACs are counted on the graph, for all
of the example inputs together; of language models in their linear layers, for one token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from secateur import timing
from secateur.errors import UsageError
from secateur.evaluation.base import Inputs, Settings, is_decoder, whole_numbers
from secateur.evaluation.runners import open_runners
from secateur.models.decoders import is_linear
from secateur.report import Metric


def inputs_of(settings: Settings, task: str) -> Inputs:
    """What the models are called with. Raises UsageError where nothing was given."""
    if settings.inputs is None:
        raise UsageError(f"{task} is of networks: give example_inputs=(x,), what they are called with")
    return settings.inputs


@dataclass(frozen=True)
class Latency:
    """``latency``, or with settings; without ``batch`` and ``threads`` those of the inputs and of the process."""

    batch: int | None = None
    repeats: int = 20
    threads: int | None = None

    @classmethod
    def parse(cls, argument: str) -> Latency:
        """From the text after ``latency:``. Raises UsageError for an unknown key or a bad number."""
        return cls(**whole_numbers("latency", argument, [f.name for f in dataclasses.fields(cls)]))

    @property
    def name(self) -> str:
        """``latency``, with the settings that were given."""
        given = [f"{f.name}={v}" for f in dataclasses.fields(self) if (v := getattr(self, f.name)) != f.default]
        return ":".join(["latency", *([",".join(given)] if given else [])])

    def measure(self, models: Mapping[str, Any], tokenizer: Any, settings: Settings) -> list[Metric]:
        """One metric, in milliseconds. Raises UsageError."""
        inputs = _with_batch(inputs_of(settings, self.name), self.batch)
        with _threads(self.threads), ExitStack() as stack:
            runners = open_runners(models)
            works = {name: stack.enter_context(runner.ready(inputs)) for name, runner in runners.items()}
            devices = {name: runner.device for name, runner in runners.items()}

            def step(done: int) -> None:
                settings.progress(self.name, done, self.repeats + 1)

            with timing.watched() as machine:
                taken = timing.take_turns(works, self.repeats, devices, step)
            how = (
                f"median of {self.repeats} interleaved repeats, one call on {str(inputs) or 'the model’s own sizes'}, "
            )
            how += f"{' and '.join(dict.fromkeys(r.kind for r in runners.values()))}, {torch.get_num_threads()} threads"
            how += machine.about + (timing.PAIRED if len(models) > 1 else "")
        repeats = {name: [1000 * seconds for seconds in times] for name, times in taken.items()}
        return [Metric(self.name, "ms", {n: median(t) for n, t in repeats.items()}, False, how, repeats=repeats)]


@dataclass(frozen=True)
class Macs:
    """``macs``: multiply-accumulates of one call, or of one token that goes through a decoder."""

    @classmethod
    def parse(cls, argument: str) -> Macs:
        """From the text after ``macs:``, which must be empty. Raises UsageError."""
        if argument:
            raise UsageError(f"macs has no settings, got '{argument}'; write macs")
        return cls()

    @property
    def name(self) -> str:
        """``macs``"""
        return "macs"

    def measure(self, models: Mapping[str, Any], tokenizer: Any, settings: Settings) -> list[Metric]:
        """One metric. Raises UsageError, or UnsupportedModelError for a module that can't be traced.

        Of decoders without example inputs the linear layers are counted, the head among them.
        """
        if settings.inputs is None and all(map(is_decoder, models.values())):
            linear = {name: float(linear_macs(model)) for name, model in models.items()}
            how = "linear layers, one token; products of queries, keys and values are left out"
            return [Metric("MACs", "", linear, False, how)]
        inputs = inputs_of(settings, self.name)
        counted = {name: runner.traced(inputs).total.macs for name, runner in open_runners(models).items()}
        how = f"counted on the graph, one call on {str(inputs) or 'the model’s own sizes'}"
        return [Metric("MACs", "", {name: float(n) for name, n in counted.items()}, False, how)]


def linear_macs(model: nn.Module) -> int:
    """Multiply-accumulates of all linear layers for one token; a head that is tied to the embedding counts."""
    weights: Any = (module.weight for module in model.modules() if is_linear(module))
    return sum(weight.numel() for weight in weights)


def _with_batch(inputs: Inputs, batch: int | None) -> Inputs:
    """The inputs with their tensors repeated or cut along the first dimension."""
    if batch is None:
        return inputs

    def sized(tensor: Tensor) -> Tensor:
        times = -(-batch // len(tensor)) if tensor.dim() else 1
        return tensor.repeat(times, *[1] * (tensor.dim() - 1))[:batch] if tensor.dim() else tensor

    args, kwargs = tree_map_only(Tensor, sized, (inputs.args, dict(inputs.kwargs)))
    sizes = {name: (batch, *shape[1:]) for name, shape in inputs.sizes.items()}
    return Inputs(args, kwargs, sizes)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
