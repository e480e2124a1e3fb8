"""The public functions; everything else is a room behind them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from secateur.evaluation import Table
    from secateur.plans import Plan
    from secateur.report import Report
    from secateur.structure import Anatomy


@dataclass(frozen=True)
class Result:
    """What ``prune`` returns: the cut model, the plan that cut it, and the report."""

    model: PreTrainedModel
    plan: Plan
    report: Report


def load(
    name: str | Path, *, dtype: str = "float32", device: str = "cpu", trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer: hub id, folder, ``.gguf`` file or built-in name (``smollm2-135m``).

    Raises ModelLoadError or UnsupportedModelError.
    """
    from secateur.models.loading import load_model

    return load_model(name, dtype=dtype, device=device, trust_remote_code=trust_remote_code)


def anatomy(model: PreTrainedModel, *, heads: str = "kv") -> Anatomy:
    """What can be cut in ``model``: groups by name, unit counts, cost per unit, what is frozen and why.

    ``heads``: ``kv`` cuts whole key-value heads with their queries, ``query`` one query head of each.
    Raises UnsupportedModelError.
    """
    from secateur.models.decoders import decoder_anatomy

    return decoder_anatomy(model, heads=heads)


def plan(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    method: str,
    sparsity: float | None = None,
    pattern: str | None = None,
    budget: str | None = None,
    calibration: str | Path = "builtin",
    samples: int = 64,
    length: int = 512,
    seed: int = 0,
    text_field: str | None = None,
    dtype: str = "auto",
    batch_tokens: int = 2048,
    options: Mapping[str, Any] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Plan:
    """Decide what to cut; ``model`` is left as it is.

    ``sparsity`` is the fraction removed, in [0, 1). ``pattern`` is N:M for weight methods. ``calibration`` is
    ``builtin``, ``self``, a text/jsonl/parquet file or the name of a data set; ``samples`` windows of ``length``
    tokens are read. ``dtype`` is that of the calibration forwards. ``options`` are the method's own.
    ``progress`` is called with (stage, done, total). The same arguments give the same plan.
    Raises UsageError, DataError, ModelError or BudgetError.
    """
    raise SystemError("under construction")


def apply(plan: Plan, model: PreTrainedModel, *, inplace: bool = False, mask: bool = False) -> PreTrainedModel:
    """The cut model. ``mask=True`` keeps the dense shapes and zeroes the same slices instead.

    Raises PlanMismatchError when the plan was made for other shapes.
    """
    from secateur.structure.surgery import apply_plan

    return apply_plan(plan, model, inplace=inplace, mask=mask)


def prune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    method: str,
    sparsity: float | None = None,
    inplace: bool = False,
    **arguments: Any,
) -> Result:
    """``plan`` and ``apply`` in one call; takes the arguments of ``plan``."""
    raise SystemError("under construction")


def evaluate(
    models: PreTrainedModel | Sequence[PreTrainedModel] | Mapping[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str] = ("perplexity:builtin", "speed", "size"),
    *,
    length: int = 512,
    windows: int = 40,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> Table:
    """Measure models side by side; the first is the dense baseline.

    Tasks: ``perplexity:builtin``, ``perplexity:FILE``, ``perplexity:DATASET``, ``speed``, ``size``,
    ``lm_eval:TASK``. ``length`` is the window in tokens and ``windows`` their number.
    Raises UsageError for an unknown task.
    """
    from secateur.evaluation import evaluate_models

    return evaluate_models(models, tokenizer, tasks, length=length, windows=windows, seed=seed, progress=progress)


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: str | Path,
    *,
    plan: Plan | None = None,
    report: Report | None = None,
    format: str = "dense",
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint that other tools load; returns the folder.

    ``format``: ``dense`` (zeros stay) or ``packed`` (bitmap and values). Uniform models become a plain checkpoint;
    others carry ``per_layer_config`` and a modelling file. Raises OutputError when the folder exists.
    """
    from secateur.models.saving import save_model

    return save_model(model, tokenizer, folder, plan=plan, report=report, format=format, overwrite=overwrite)
