"""What is measured of a compressed cache: perplexity of what follows a prefix, facts that were hidden in a prompt, and
what other files add: speed (``speed.py``) and tasks of lm-eval (``harness.py``).

A prompt is read once for all compressions, and every measurement is a line of the journal, so that a killed comparison
goes on behind the last one, also with more windows, tasks or compressions than it was begun with.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from secateur.cache.prompts import read_prompt
from secateur.errors import SecateurError, UsageError
from secateur.evaluation.continuation import continuation_losses, retrieved
from secateur.evaluation.retrieval import Case, Retrieval
from secateur.methods.cachespec import parse_cache_spec
from secateur.observe.calibration import check_length, evaluating, load_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DENSE = "dense"
QUESTIONS = ("later", "end")


@dataclass(frozen=True)
class Measurement:
    """One prompt with one cache. ``loss`` of a window of text is in nats per token, and so is ``log_likelihood`` of an
    answer; ``found`` says whether it was written. ``prefill`` and ``decode`` are tokens per second of reading a prompt
    of ``length`` tokens, and of writing behind it; ``scores`` are those of a task of lm-eval. A measurement that failed
    has an ``error`` and nothing else.
    """

    item: str
    spec: str
    bytes_dense: int = 0
    bytes_held: int = 0
    bytes_ideal: int = 0
    loss: float | None = None
    log_likelihood: float | None = None
    found: bool | None = None
    task: str = ""
    length: int = 0
    depth: float = 0.0
    prefill: float | None = None
    decode: float | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    error: str = ""


class Item(ABC):
    """Something that is measured with every cache in turn; ``name`` is what the journal knows it by."""

    name: str

    @abstractmethod
    def opened(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Callable[[str], Measurement]:
        """What measures a spec (or ``dense``), once what all of them share is done."""


@dataclass(frozen=True)
class Reading(Item):
    """A prompt, [tokens] int64, and what is measured behind its cache."""

    name: str
    prompt: Tensor
    measure: Callable[[Any], dict[str, Any]]

    def opened(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Callable[[str], Measurement]:
        read = read_prompt(model, self.prompt[None], tokenizer)

        def measured(spec: str) -> Measurement:
            cache = read.compressed(parse_cache_spec("knorm:0" if spec == DENSE else spec))
            report = cache.report()
            sizes = {name: report[name] for name in ("bytes_dense", "bytes_held", "bytes_ideal")}
            return Measurement(self.name, spec, **sizes, **self.measure(cache))

        return measured


@dataclass(frozen=True)
class Protocol:
    """What is read: windows of ``prefix`` tokens that are compressed and ``after`` that are measured, needles, tasks of
    lm-eval, and prompts of ``speed`` tokens, ``repeats`` times, behind which ``new`` are written.
    """

    text: str = "builtin"
    prefix: int = 1024
    after: int = 256
    windows: int = 8
    needles: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    question: str = "later"
    seed: int = 0
    text_field: str | None = None
    speed: tuple[int, ...] = ()
    repeats: int = 3
    new: int = 32

    def __post_init__(self) -> None:
        if self.question not in QUESTIONS:
            raise UsageError(f"question must be one of {', '.join(QUESTIONS)}, got '{self.question}'")
        for name, least in (("prefix", 2), ("after", 2), ("windows", 0), ("repeats", 1), ("new", 1)):
            value = getattr(self, name)
            if type(value) is not int:
                raise UsageError(f"{name} must be a whole number, got {value!r}")
            if value < least:
                raise UsageError(f"{name} must be at least {least}, got {value}")
        if any(length < 1 for length in self.speed):
            raise UsageError(f"speed takes lengths of prompts, got {', '.join(map(str, self.speed))}")
        if not (self.windows or self.needles or self.tasks or self.speed):
            raise UsageError("nothing is measured without windows of text, needles, tasks and lengths for speed")
        for needle in self.needles:
            Retrieval.parse(needle)

    def describe(self) -> list[str]:
        """In words, one line per kind of measurement."""
        said = []
        if self.windows:
            said.append(
                f"perplexity: {self.prefix} tokens compressed, the next {self.after} measured without the first; "
                f"{self.windows} windows asked"
            )
        if self.needles:
            where = "behind the compressed context" if self.question == "later" else "at the end of what is compressed"
            said.append(f"needles: {', '.join(self.needles)}; the question stands {where}; seed {self.seed}")
        if self.tasks:
            said.append(f"tasks: {', '.join(self.tasks)}; the question is part of what is compressed")
        if self.speed:
            said.append(
                f"speed: prompts of {', '.join(f'{n:,}' for n in self.speed)} random tokens, {self.new} written behind "
                f"each; medians of {self.repeats} interleaved repeats, batch 1"
            )
        return said


def readings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: Protocol) -> Iterator[Item]:
    """Every prompt that is read. Raises UsageError or DataError."""
    if asked.windows:
        yield from _windows(model, tokenizer, asked)
    for task in map(Retrieval.parse, asked.needles):
        check_length(model, max(task.lengths))
        text = _whole_text(model, tokenizer, asked, max(task.lengths)) if task.haystack == "text" else None
        for number, case in enumerate(task.cases(tokenizer, asked.seed, text)):
            yield _question(model, tokenizer, case, asked, number % task.samples)


def _windows(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: Protocol) -> Iterator[Reading]:
    tokens = load_tokens(
        asked.text,
        tokenizer,
        samples=asked.windows,
        length=asked.prefix + asked.after,
        seed=asked.seed,
        split="evaluation",
        text_field=asked.text_field,
        model=model,
        allow_fewer=True,
    )
    for number, ids in enumerate(tokens.ids):
        after = ids[asked.prefix :]

        def measure(cache: Any, after: Tensor = after) -> dict[str, Any]:
            return {"loss": float(continuation_losses(model, cache, after).double().mean())}

        yield Reading(f"text {number}", ids[: asked.prefix], measure)


def _whole_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: Protocol, length: int) -> str:
    """As much of the text as a haystack of ``length`` tokens takes, and some more."""
    ids = load_tokens(
        asked.text,
        tokenizer,
        samples=1,
        length=2 * length,
        seed=asked.seed,
        split="evaluation",
        text_field=asked.text_field,
    ).ids
    return str(tokenizer.decode(ids[0], skip_special_tokens=True))


def _question(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, case: Case, asked: Protocol, sample: int
) -> Reading:
    aware = asked.question == "end"

    def measure(cache: Any) -> dict[str, Any]:
        got = retrieved(model, tokenizer, cache, case, question_aware=aware)
        place = {"task": case.task, "length": case.length, "depth": case.depth}
        return {"log_likelihood": got.log_likelihood, "found": got.found, **place}

    return Reading(f"{case.task} {case.length} {case.depth:.3f} {sample}", case.parts(aware)[0], measure)


def measure_all(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    todo: Sequence[Item],
    specs: Sequence[str],
    known: Mapping[tuple[str, str], Measurement],
    keep: Callable[[dict[str, Any]], None],
    progress: Callable[[str, int, int], None],
) -> list[Measurement]:
    """Every item with every spec, ``dense`` among them; what is ``known`` isn't measured again.

    ``keep`` is called with every new measurement. A spec that fails for one prompt isn't tried on the others.
    """
    found = dict(known)
    total, done = len(todo) * len(specs), 0
    failed: set[str] = set()
    with evaluating(model):
        for item in todo:
            missing = [spec for spec in specs if (item.name, spec) not in found and spec not in failed]
            done += len(specs) - len(missing)
            progress("caches", done, total)
            measured = item.opened(model, tokenizer) if missing else None
            for spec in missing:
                assert measured is not None
                try:
                    one = measured(spec)
                except SecateurError as error:
                    failed.add(spec)
                    one = Measurement(item.name, spec, error=" ".join(str(error).split()))
                else:
                    # that the journal can't be written is no failure of the spec
                    keep(asdict(one))
                found[item.name, spec] = one
                done += 1
                progress("caches", done, total)
    return [found[item.name, spec] for item in todo for spec in specs if (item.name, spec) in found]
