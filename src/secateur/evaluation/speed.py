"""Tokens per second: reading the prompt, and writing with the KV cache, beside what memory bandwidth allows.

Repeats are interleaved over the models (dense, pruned, dense, pruned, ...), so that a machine that slows down or
warms up meets all of them alike; the median is reported, and as the change of a speed the median of the ratios of each
repeat. Writing one token reads every weight once, so

    decode bound = batch * memory bandwidth / bytes of weights read per step

with the bandwidth measured on the spot by copying a block of memory (bytes read + bytes written per second). It
leaves out the KV cache and the activations. A model that fits the processor's cache can beat it; a mixture of experts
that reads few of its experts does.

Between the two, `decode, products alone` does nothing of a token but its products with weights, of which a cut model
has less. The rest of a token is attention to the cache, norms, activations, and what calling all of that costs, of
which a narrower model has little less.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from secateur import timing
from secateur.evaluation.base import Settings, whole_numbers
from secateur.observe.calibration import cached_forward, check_length, evaluating
from secateur.report import Metric
from secateur.report.report import DECODE, DECODE_BOUND, DECODE_PRODUCTS
from secateur.tensorfiles import tensors_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Far beyond any processor cache.
BANDWIDTH_BYTES = 256 * 2**20
# The products of a token are those of any other one.
PRODUCTS_TOKENS = 8


@dataclass(frozen=True)
class Speed:
    """``speed`` or ``speed:batch=1,prompt=256,new=32,repeats=5``: sequences, prompt tokens, new tokens, repeats."""

    batch: int = 1
    prompt: int = 256
    new: int = 32
    repeats: int = 5

    @classmethod
    def parse(cls, argument: str) -> Speed:
        """From the text after ``speed:``. Raises UsageError for an unknown key or a bad number."""
        return cls(**whole_numbers("speed", argument, [f.name for f in dataclasses.fields(cls)]))

    @property
    def name(self) -> str:
        """The task with its settings."""
        return f"speed:batch={self.batch},prompt={self.prompt},new={self.new},repeats={self.repeats}"

    def check(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, settings: Settings) -> None:
        check_length(model, self.prompt + self.new, self.name)

    def measure(
        self, models: Mapping[str, PreTrainedModel], tokenizer: PreTrainedTokenizerBase | None, settings: Settings
    ) -> list[Metric]:
        """``prefill``, ``decode``, ``decode, products alone`` and ``decode bound``, all in tokens per second.

        Without the third where the products of a model aren't those of modules.
        """
        for model in models.values():
            self.check(model, tokenizer, settings)
        with timing.watched() as machine:
            times = self._repeat(models, settings)
        how = f"batch {self.batch}, median of {self.repeats} interleaved repeats, {_machine(models)}{machine.about}"
        how += timing.PAIRED if len(models) > 1 else ""
        again = f"the calls that a token makes of modules with matrices, in order, {self._again} times over, {how}"
        prompts, written = f"{self.prompt} prompt tokens, {how}", f"{self.new} new tokens after {self.prompt}, KV cache"
        return [
            *self._metric("prefill", self.prompt, times, 0, prompts),
            *self._metric(DECODE, self.new, times, 1, f"{written}, {how}"),
            *self._metric(DECODE_PRODUCTS, self._again, times, 2, again),
            self._bound(models),
        ]

    def _metric(
        self, name: str, tokens: int, times: Mapping[str, list[tuple[float, float, float]]], part: int, how: str
    ) -> list[Metric]:
        """Tokens per second by this part of the times; nothing where none took any."""
        many = self.batch * tokens
        repeats = {n: [many / taken[part] for taken in runs] for n, runs in times.items() if all(t[part] for t in runs)}
        values = {n: many / median(taken[part] for taken in times[n]) for n in repeats}
        return [Metric(name, "tokens/s", values, True, how, repeats=repeats)] if values else []

    def _repeat(
        self, models: Mapping[str, PreTrainedModel], settings: Settings
    ) -> dict[str, list[tuple[float, float, float]]]:
        times: dict[str, list[tuple[float, float, float]]] = {name: [] for name in models}
        for repeat in range(-1, self.repeats):  # the first round warms up
            for name, model in models.items():
                seconds = self._time(model, settings.seed)
                if repeat >= 0:
                    times[name].append(seconds)
            settings.progress("speed", repeat + 2, self.repeats + 1)
        return times

    @property
    def _again(self) -> int:
        return min(self.new, PRODUCTS_TOKENS)

    @torch.inference_mode()
    def _time(self, model: PreTrainedModel, seed: int) -> tuple[float, float, float]:
        """Seconds of the prompt, of the new tokens, and of the products of ``_again`` tokens, 0 where none is known."""
        device = model.device
        vocabulary = model.config.get_text_config().vocab_size
        generator = torch.Generator().manual_seed(seed)
        prompt_BT = torch.randint(vocabulary, (self.batch, self.prompt), generator=generator).to(device)
        with evaluating(model):
            calls = products(model, lambda: cached_forward(model, prompt_BT[:, :1]))
            start = timing.now(device)
            logits_BV, cache = cached_forward(model, prompt_BT)
            middle = timing.now(device)
            for _ in range(self.new):
                logits_BV, cache = cached_forward(model, logits_BV.argmax(dim=-1, keepdim=True), cache)
            end = timing.now(device)
            alone = timing.seconds(lambda: [call() for _ in range(self._again) for call in calls], device)
        return middle - start, end - middle, alone if calls else 0.0

    def _bound(self, models: Mapping[str, PreTrainedModel]) -> Metric:
        rates = {device: memory_bandwidth(device) for device in {model.device for model in models.values()}}
        values = {
            name: self.batch * rates[model.device] / weight_bytes_per_step(model) for name, model in models.items()
        }
        measured = ", ".join(f"{rate / 1e9:.1f} GB/s" for rate in rates.values())
        how = f"batch {self.batch} * measured copy bandwidth ({measured}) / bytes of weights read per step"
        return Metric(DECODE_BOUND, "tokens/s", values, True, how)


def products(model: nn.Module, work: Callable[[], object]) -> list[Callable[[], object]]:
    """The calls that ``work`` makes of modules with matrices of their own, in order and with what they are given.

    An embedding, which reads a row, isn't one.
    """
    calls: list[Callable[[], object]] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(lambda: module(*args, **kwargs))

    hooks = [
        module.register_forward_pre_hook(note, with_kwargs=True)
        for module in model.modules()
        if not isinstance(module, nn.Embedding) and any(weight.ndim > 1 for weight in module.parameters(recurse=False))
    ]
    try:
        work()
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def weight_bytes_per_step(model: PreTrainedModel) -> int:
    """Bytes of weights that a decoding step reads: all but an input embedding that nothing else uses."""
    tensors = tensors_of(model)
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    table = _untied_embedding(model)
    return total if table is None else total - table.numel() * table.element_size()


def memory_bandwidth(device: torch.device, size_bytes: int = BANDWIDTH_BYTES, repeats: int = 5) -> float:
    """Bytes per second, read and written together, of copying a block of memory; median of ``repeats``."""
    source = torch.ones(size_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)  # the pages of the target must exist before time is taken
    return 2 * size_bytes / median(timing.seconds(lambda: target.copy_(source), device) for _ in range(repeats))


def _untied_embedding(model: PreTrainedModel) -> Tensor | None:
    table = getattr(model.get_input_embeddings(), "weight", None)
    head = getattr(model.get_output_embeddings(), "weight", None)
    return None if table is head else table


def _machine(models: Mapping[str, PreTrainedModel]) -> str:
    kinds = sorted({model.device.type for model in models.values()})
    dtypes = sorted({str(model.dtype).removeprefix("torch.") for model in models.values()})
    threads = f", {torch.get_num_threads()} threads" if "cpu" in kinds else ""
    return f"{'+'.join(kinds)} {'+'.join(dtypes)}{threads}"
