"""A compression of the KV cache that fits into so many bytes: shapes say what fits, and a text what is best of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.cache.sizes import CacheShape, cache_shape, predicted_bytes
from secateur.cachestudy.compare import compare_caches
from secateur.cachestudy.measuring import QUESTIONS, Protocol
from secateur.cachestudy.smallest import STEPS, first_true
from secateur.errors import BudgetError, UnsupportedModelError, UsageError
from secateur.methods.cachespec import at_sparsity, parse_cache_spec
from secateur.models.shards import parse_size
from secateur.report.numbers import format_bytes, percent

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Rung:
    """A press, and up to which fraction removed it is taken before the next one."""

    press: str
    most: float


# In the order of what they lost in docs/results/kv-cache-smollm2-135m.md; evictions last, since a token that is gone is
# gone for every later question. Where the question stands decides which of those.
_WHOLE = (Rung("think", 0.4), Rung("mustafar", 0.5))
LADDERS = {
    "end": (*_WHOLE, Rung("adakv(snapkv)", 0.6), Rung("adakv(snapkv)+mustafar:0.5", 0.9), Rung("snapkv", 0.99)),
    "later": (
        *_WHOLE,
        Rung("expected_attention", 0.5),
        Rung("expected_attention+mustafar:0.5", 0.8),
        Rung("keydiff", 0.99),
    ),
}


@dataclass(frozen=True)
class Candidate:
    """A setting that fits. ``bytes_held`` is what it holds behind the prompt and the new tokens, ``bytes_peak`` the
    most on the way, ``gentle`` whether it removes no more than what the press is known to bear; ``perplexity`` is
    measured where there is a text.
    """

    spec: str
    press: str
    sparsity: float
    bytes_held: int
    bytes_peak: int
    gentle: bool
    perplexity: float | None = None


@dataclass(frozen=True)
class Recommendation:
    """``spec`` is what to take, ``dense`` where nothing has to be removed; ``candidates`` are those that fit."""

    spec: str
    context: int
    new: int
    batch: int
    memory: int
    bytes_dense: int
    question: str
    candidates: tuple[Candidate, ...]
    missing: tuple[str, ...]
    """presses that can't get that small"""
    dense_perplexity: float | None = None
    protocol: str = ""

    @property
    def chosen(self) -> Candidate | None:
        """The candidate that is recommended; None for the dense cache."""
        return next((one for one in self.candidates if one.spec == self.spec), None)

    @property
    def sentence(self) -> str:
        """The recommendation in words."""
        asked = f"{self.context:,} tokens" + (f" and {self.new:,} new ones" if self.new else "")
        asked += f", {self.batch} sequences" if self.batch > 1 else ""
        room, dense = format_bytes(self.memory), format_bytes(self.bytes_dense)
        if self.chosen is None:
            return f"{asked}: a dense cache takes {dense} and fits into {room}, nothing has to be removed"
        held = self.chosen.bytes_held
        measured = "the best on this text of those that fit" if self.chosen.perplexity else "the first that fits"
        return (
            f"{asked}: {self.spec} holds {format_bytes(held)} ({percent(held / self.bytes_dense)} of {dense}), "
            f"at most {format_bytes(self.chosen.bytes_peak)} while the prompt is read; it is {measured}"
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {**asdict(self), "candidates": [asdict(one) for one in self.candidates], "missing": list(self.missing)}


def recommend_cache(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    context: int,
    memory: str | int,
    new: int = 0,
    batch: int = 1,
    question: str = "later",
    presses: Sequence[str] | None = None,
    text: str | Path | None = None,
    prefix: int = 1024,
    after: int = 256,
    windows: int = 4,
    progress: Callable[[str, int, int], None] | None = None,
) -> Recommendation:
    """A compression of the KV cache of ``model`` with which a prompt of ``context`` tokens fits into ``memory``.

    ``memory`` is a size (``2GiB``) or bytes, for the cache alone; ``new`` tokens are written behind the prompt, of each
    of ``batch`` sequences. ``question="end"`` is for prompts that end with what is asked, ``"later"`` for contexts that
    are asked later. ``presses`` are compressions without their fraction removed (``snapkv``, ``snapkv+mustafar:0.5``);
    by default a few that suit the question. For each the smallest fraction is found that fits, from shapes: ``model``
    may be on the meta device. The first is recommended that removes no more than it is known to bear. Room is needed
    for what is held, and while the prompt is read for one layer that is dense still; what scores take on the way isn't
    counted. With a ``text``, which takes the ``tokenizer``, that one is recommended of those that fit which costs least
    perplexity, measured as by ``compare_caches``.
    Raises UsageError, DataError, and BudgetError where nothing fits.
    """
    for name, value, least in (("context", context, 1), ("new", new, 0), ("batch", batch, 1)):
        if value < least:
            raise UsageError(f"{name} must be at least {least}, got {value}")
    if question not in QUESTIONS:
        raise UsageError(f"question must be one of {', '.join(QUESTIONS)}, got '{question}'")
    ladder = LADDERS[question] if presses is None else tuple(Rung(press, 1.0) for press in presses)
    room, shape = parse_size(memory), cache_shape(model)
    size = _Size(shape, context, new, batch)
    dense = shape.dense_bytes(context + new, batch)
    made = Recommendation("dense", context, new, batch, room, dense, question, (), ())
    if dense <= room:
        return made
    found = {rung.press: _smallest(rung, size, room) for rung in ladder}
    candidates = tuple(candidate for candidate in found.values() if candidate is not None)
    if not candidates:
        raise BudgetError(
            f"a cache of {context:,} tokens takes {format_bytes(dense)}, and none of {', '.join(found)} gets it into"
            f" {format_bytes(room)}: give it more memory, or take a shorter context"
        )
    first = next((one for one in candidates if one.gentle), max(candidates, key=lambda one: one.bytes_held))
    missing = tuple(press for press, candidate in found.items() if candidate is None)
    made = replace(made, spec=first.spec, candidates=candidates, missing=missing)
    if text is None:
        return made
    if tokenizer is None:
        raise UsageError("a text is read with the model's tokenizer: give it too")
    return _measured(made, model, tokenizer, Protocol(str(text), prefix, after, windows, question=question), progress)


def _measured(
    made: Recommendation,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: Protocol,
    progress: Callable[[str, int, int], None] | None,
) -> Recommendation:
    """The same with perplexities, and the best candidate. Raises the error of a candidate where all of them fail."""
    compared = compare_caches(
        model,
        tokenizer,
        presses=[one.spec for one in made.candidates],
        text=asked.text,
        prefix=asked.prefix,
        after=asked.after,
        windows=asked.windows,
        question=asked.question,
        progress=progress,
    )
    dense, *rows = compared.rows
    candidates = tuple(replace(c, perplexity=row.perplexity) for c, row in zip(made.candidates, rows, strict=True))
    known = {one.spec: one.perplexity for one in candidates if one.perplexity is not None}
    if not known:
        raise UnsupportedModelError(f"none of the candidates could be measured: {rows[0].error}")
    best = min(known, key=known.__getitem__)
    return replace(
        made, spec=best, candidates=candidates, dense_perplexity=dense.perplexity, protocol=asked.describe()[0]
    )


@dataclass(frozen=True)
class _Size:
    """What a spec takes of a prompt and what follows it."""

    shape: CacheShape
    context: int
    new: int
    batch: int

    def held(self, spec: str) -> int:
        behind = predicted_bytes(parse_cache_spec(spec), self.shape, self.context, self.batch)
        more = self.shape.dense_bytes(self.context + self.new, self.batch)
        return behind + more - self.shape.dense_bytes(self.context, self.batch)

    def peak(self, spec: str) -> int:
        behind = predicted_bytes(parse_cache_spec(spec), self.shape, self.context, self.batch)
        # every layer is compressed as soon as its attention has read the prompt
        return max(self.held(spec), behind + self.shape.largest_layer(self.context, self.batch))


def _smallest(rung: Rung, size: _Size, room: int) -> Candidate | None:
    """The smallest fraction removed with which a press fits; None where none does."""

    def fits(step: int) -> bool:
        return size.peak(at_sparsity(rung.press, step / STEPS)) <= room

    step = first_true(fits, STEPS - 1)
    if step is None:
        return None
    spec = at_sparsity(rung.press, step / STEPS)
    gentle = step / STEPS <= rung.most
    return Candidate(spec, rung.press, step / STEPS, size.held(spec), size.peak(spec), gentle)
