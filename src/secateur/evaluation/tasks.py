"""From the text of a task to its evaluation, and the loop over tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.errors import UsageError, nearest
from secateur.evaluation.accuracy import Accuracy
from secateur.evaluation.base import Evaluation, Inputs, Progress, Settings, is_decoder, silent
from secateur.evaluation.latency import Latency, Macs
from secateur.evaluation.lm_eval_task import LmEval
from secateur.evaluation.perplexity import Perplexity
from secateur.evaluation.request import Request
from secateur.evaluation.size import Size
from secateur.evaluation.speed import Speed
from secateur.evaluation.tables import Table
from secateur.kinds import DECODER_TASKS, NETWORK_TASKS, is_onnx

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Kind of task → (how it is written, what makes it out of the text after the colon).
KINDS: dict[str, tuple[str, Callable[[str], Evaluation]]] = {
    "perplexity": ("perplexity:SOURCE", Perplexity.parse),
    "speed": ("speed", Speed.parse),
    "request": ("request", Request.parse),
    "size": ("size", Size.parse),
    "lm_eval": ("lm_eval:TASK", LmEval.parse),
    "accuracy": ("accuracy:IMAGES", Accuracy.parse),
    "latency": ("latency", Latency.parse),
    "macs": ("macs", Macs.parse),
}

# What only language models have.
DECODERS_ONLY = ("perplexity", "speed", "request", "lm_eval")

FOR_ALL = tuple(form for kind, (form, _) in KINDS.items() if kind not in DECODERS_ONLY)


def make_task(text: str) -> Evaluation:
    """The evaluation that ``text`` names: ``perplexity:builtin``, ``speed:batch=4``, ``size``, ``lm_eval:hellaswag``,
    ``accuracy:photos?limit=1000``, ``latency:batch=8``, ``macs``.

    Raises UsageError, with the nearest kind, when there is none.
    """
    kind, _, argument = text.partition(":")
    if kind not in KINDS:
        written = ", ".join(form for form, _ in KINDS.values())
        raise UsageError(f"unknown task '{text}'{nearest(kind, KINDS)} (tasks are {written})")
    return KINDS[kind][1](argument)


def make_network_tasks(texts: Sequence[str]) -> list[Evaluation]:
    """The evaluations of networks that aren't language models. Raises UsageError for those that need one."""
    for text in texts:
        if text.partition(":")[0] in DECODERS_ONLY:
            raise UsageError(f"{text} is measured of language models only; other networks have {', '.join(FOR_ALL)}")
    return [make_task(text) for text in texts]


def evaluate_models(
    models: Any,
    tokenizer: PreTrainedTokenizerBase | None = None,
    tasks: Sequence[str] | None = None,
    *,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
    length: int = 512,
    windows: int = 40,
    seed: int = 0,
    progress: Progress | None = None,
    text_field: str | None = None,
    folders: Mapping[str, str | Path] | None = None,
    tokenizers: Mapping[str, PreTrainedTokenizerBase | None] | None = None,
) -> Table:
    """Measure models side by side; the first is the dense baseline.

    A sequence of models is named ``dense``, ``pruned`` (or ``pruned-1``, ``pruned-2``, ...); a mapping gives the
    names. ``length`` is the window in tokens and ``windows`` their number. ``folders`` maps names to the checkpoint
    folders whose size on disk is shown, ``tokenizers`` to those of models that have another than ``tokenizer``.
    ``example_inputs`` and ``example_kwargs`` are what networks are called with,
    and sizes by name for ONNX models. All tasks are checked before the first is measured.
    Raises UsageError for an unknown task, DataError for unusable data, NonFiniteError for a broken model.
    """
    named = name_models(models)
    inputs = make_inputs(example_inputs, example_kwargs)
    if inputs is None and any(map(is_onnx, named.values())):
        inputs = Inputs()
    settings = Settings(
        length=length,
        windows=windows,
        seed=seed,
        text_field=text_field,
        folders={name: Path(folder) for name, folder in (folders or {}).items()},
        inputs=inputs,
        progress=progress or silent,
        tokenizers=_others(tokenizer, tokenizers or {}),
    )
    if tasks is None:
        tasks = DECODER_TASKS if inputs is None else NETWORK_TASKS
    texts = [tasks] if isinstance(tasks, str) else tasks
    decoders = all(map(is_decoder, named.values()))
    evaluations = [make_task(text) for text in texts] if decoders else make_network_tasks(texts)
    metrics = [metric for task in evaluations for metric in task.measure(named, tokenizer, settings)]
    return Table(metrics, list(named))


def _others(
    tokenizer: PreTrainedTokenizerBase | None, tokenizers: Mapping[str, PreTrainedTokenizerBase | None]
) -> dict[str, PreTrainedTokenizerBase]:
    """The tokenizers that have another vocabulary than the first."""
    if tokenizer is None:
        return {}
    given = {name: own for name, own in tokenizers.items() if own is not None and own is not tokenizer}
    vocabulary = tokenizer.get_vocab() if given else {}
    return {name: own for name, own in given.items() if own.get_vocab() != vocabulary}


def make_inputs(args: Any, kwargs: Mapping[str, Any] | None) -> Inputs | None:
    """What networks are called with; None when nothing was given. Raises UsageError."""
    if args is None and kwargs is None:
        return None
    if isinstance(args, Mapping):
        return Inputs(sizes={name: tuple(shape) for name, shape in args.items()})
    if args is not None and not isinstance(args, tuple | list):
        raise UsageError(
            f"example_inputs must be a tuple of what the models are called with, got {type(args).__name__}"
        )
    return Inputs(tuple(args or ()), dict(kwargs or {}))


def name_models(models: Any) -> dict[str, Any]:
    """Models by name, the baseline first. Raises UsageError when there are none."""
    if isinstance(models, Mapping):
        named = dict(models)
    elif isinstance(models, list | tuple):
        several = len(models) > 2
        pruned = [f"pruned-{i}" if several else "pruned" for i in range(1, len(models))]
        named = dict(zip(["dense", *pruned], models, strict=False))
    else:
        # whatever else is one model; nn.Sequential is a sequence too
        named = {"dense": models}
    if not named:
        raise UsageError("there is no model to evaluate; give at least one")
    return named
