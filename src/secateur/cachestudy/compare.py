"""Compressions of the KV cache side by side: which are run, the journal, and what is written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.cache.sizes import cache_shape, predicted_bytes
from secateur.cachestudy.harness import answerings
from secateur.cachestudy.measuring import DENSE, Measurement, Protocol, measure_all, readings
from secateur.cachestudy.results import CacheComparison, Setting, rows_of
from secateur.cachestudy.smallest import STEPS, first_true
from secateur.cachestudy.speed import timings
from secateur.errors import OutputError, UsageError
from secateur.evaluation.retrieval import Retrieval
from secateur.journal import LineJournal
from secateur.methods.cachespec import at_sparsity, parse_cache_spec
from secateur.models.fingerprint import fingerprint
from secateur.models.sources import Source
from secateur.report.folder import write_study
from secateur.versions import library_versions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RATIOS = (0.25, 0.5, 0.75)
_FILES = ("cache.jsonl", "cache.json", "cache.html")


def compare_caches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    presses: Sequence[str],
    ratios: Sequence[float] = RATIOS,
    held: Sequence[float] | None = None,
    text: str | Path = "builtin",
    prefix: int = 1024,
    after: int = 256,
    windows: int = 8,
    needles: Sequence[str] = (),
    tasks: Sequence[str] = (),
    question: str = "later",
    seed: int = 0,
    text_field: str | None = None,
    speed: Sequence[int] = (),
    repeats: int = 3,
    new: int = 32,
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> CacheComparison:
    """Hold compressions of the KV cache against each other, and against the dense cache.

    ``presses`` are compressions without their fraction removed, which is every one of ``ratios`` in turn
    (``snapkv``, ``snapkv+mustafar``), or the smallest with which a prompt's cache holds at most a fraction ``held`` of
    the dense bytes; one that names all its fractions (``snapkv:0.5``) is run as it is. Measured are the perplexity of
    the ``after`` tokens that follow each of ``windows`` compressed prefixes of ``text`` (none with ``windows=0``), and
    the ``needles``, tasks as ``niah:length=1024/4096,depths=5`` or ``kv:length=1024``; ``tasks`` are those of lm-eval
    whose answers are written, ``lm_eval:longbench_qasper?limit=20``. ``question`` says where their
    question stands: ``later``, behind the compressed context, or at its ``end``. ``speed`` lists lengths of prompts at
    which tokens per second are measured, of reading them and of writing ``new`` tokens behind them, as medians of
    ``repeats`` in which all caches take turns. ``out`` is a folder for journal, JSON
    and page; with ``resume`` what is done there isn't done again.
    Raises UsageError, DataError or OutputError.
    """
    _check_lists(presses=presses, ratios=ratios, held=held or (), needles=needles, tasks=tasks, speed=speed)
    asked = Protocol(
        text=str(text),
        prefix=prefix,
        after=after,
        windows=windows,
        needles=tuple(needles),
        tasks=tuple(tasks),
        question=question,
        seed=seed,
        text_field=text_field,
        speed=tuple(speed),
        repeats=repeats,
        new=new,
    )
    settings, missing = _settings(model, presses, ratios, held, _sized(asked))
    # all that can be wrong is known before anything is written
    todo = [*readings(model, tokenizer, asked), *answerings(asked), *timings(model, asked)]
    journal, known = (None, {}) if out is None else _journal(Path(out), model, asked, resume, overwrite)
    specs = [DENSE, *dict.fromkeys(setting.spec for setting in settings)]
    found = measure_all(
        model,
        tokenizer,
        todo,
        specs,
        known,
        journal.append if journal else lambda line: None,
        progress or (lambda stage, done, total: None),
    )
    name = str(getattr(model, "secateur_name", "") or type(model).__name__)
    made = CacheComparison(name, asked, rows_of(settings, found), tuple(found), tuple(missing))
    return made if out is None else replace(made, missing=(*made.missing, *_write(made, Path(out))))


def _check_lists(**given: Any) -> None:
    """Raises UsageError for one text or number where several belong."""
    for name, values in given.items():
        if isinstance(values, str) or not isinstance(values, Iterable):
            raise UsageError(f"{name} takes a list: write {name}=[{values!r}]")


def _sized(asked: Protocol) -> int:
    """The length of the prompts of which bytes are compared."""
    if asked.windows:
        return asked.prefix
    if asked.needles:
        return max(Retrieval.parse(asked.needles[0]).lengths)
    return max(asked.speed) if asked.speed else asked.prefix


def _settings(
    model: PreTrainedModel, presses: Sequence[str], ratios: Sequence[float], held: Sequence[float] | None, tokens: int
) -> tuple[list[Setting], list[str]]:
    """What is run, and what can't be. Raises UsageError."""
    twice = next((press for press in presses if list(presses).count(press) > 1), None)
    if not presses or twice is not None:
        raise UsageError(f"press {twice} is named twice" if twice else "name at least one press, such as snapkv")
    for name, values in (("ratios", ratios), ("held", held or ())):
        if not all(isinstance(value, int | float) and 0 < value < 1 for value in values):
            raise UsageError(f"{name} must lie in (0, 1), got {', '.join(map(repr, values))}")
    shape = cache_shape(model)
    settings, missing = [], []
    for press in presses:
        if _is_whole(press):
            settings.append(Setting(press, None, press))
        elif held is None:
            settings += [Setting(press, ratio, at_sparsity(press, ratio)) for ratio in sorted(set(ratios))]
        else:
            dense = shape.dense_bytes(tokens)
            for most in sorted(set(held), reverse=True):

                def fits(step: int, press: str = press, room: float = most * dense) -> bool:
                    return predicted_bytes(parse_cache_spec(at_sparsity(press, step / STEPS)), shape, tokens) <= room

                step = first_true(fits, STEPS - 1)
                if step is None:
                    missing.append(f"{press} can't get to {most:.0%} of {tokens:,} tokens")
                else:
                    settings.append(Setting(press, most, at_sparsity(press, step / STEPS)))
    if not settings:
        raise UsageError("nothing is left to compare: " + ("; ".join(missing) or "no ratio was given"))
    return settings, missing


def _is_whole(press: str) -> bool:
    """Whether every step names its fraction. Raises UsageError for what can't be read."""
    try:
        at_sparsity(press, 0.5)
    except UsageError:
        parse_cache_spec(press)
        return True
    return False


def _journal(
    folder: Path, model: PreTrainedModel, asked: Protocol, resume: bool, overwrite: bool
) -> tuple[LineJournal, dict[tuple[str, str], Measurement]]:
    # more windows, needles, lengths and presses may come later: their measurements have names of their own
    later = ("windows", "needles", "tasks", "speed", "repeats", "new")
    fixed = {key: value for key, value in asdict(asked).items() if key not in later}
    fixed |= {"weights": fingerprint(Source(model)).weights, "dtype": str(model.dtype), "versions": library_versions()}
    journal = LineJournal(folder / _FILES[0], fixed, "a comparison of caches")
    if journal.path.is_file():
        if resume:
            try:
                lines = [Measurement(**line) for line in journal.lines()]
            except TypeError as error:
                raise journal.damaged(str(error)) from None
            return journal, {(one.item, one.spec): one for one in lines}
        if not overwrite:
            raise OutputError(
                f"{folder} holds a comparison of caches: pass --resume to go on with it, or --overwrite to begin anew"
            )
        for name in _FILES:
            (folder / name).unlink(missing_ok=True)
    elif folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise OutputError(f"{folder} exists and holds no comparison of caches: choose another folder")
    journal.start()
    return journal, {}


def _write(made: CacheComparison, folder: Path) -> list[str]:
    def render() -> str:
        from secateur.cachestudy import page

        return page.render(made)

    return write_study(folder, _FILES[1], made.to_dict(), _FILES[2], render)


def notes_of(made: CacheComparison) -> list[str]:
    """What the user should know beside the table."""
    return [*made.missing, *(f"{row.spec} failed: {row.error}" for row in made.failed)]
