"""Any task of the Language Model Evaluation Harness, run on the models in memory.

    lm_eval:hellaswag                     a task, group or tag that lm-eval ships
    lm_eval:hellaswag?limit=100&fewshot=5 the first 100 items only, 5 examples in the prompt
    lm_eval:tasks/mine.yaml               a local task file; works offline when its data are local

Source: EleutherAI/lm-evaluation-harness (MIT), the PyPI package ``lm-eval``.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.drawing import apart
from secateur.errors import DataError, SecateurError, UsageError, nearest, require_extra
from secateur.evaluation.base import Settings
from secateur.kinds import is_task_file
from secateur.observe.calibration import evaluating
from secateur.report import Metric

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

QUERY = ("limit", "fewshot", "batch")


@dataclass(frozen=True)
class LmEval:
    """``lm_eval:TASK?limit=ITEMS&fewshot=EXAMPLES&batch=SEQUENCES``; without ``limit`` all items are run."""

    task: str
    limit: int | None = None
    fewshot: int | None = None
    batch: int = 1

    @classmethod
    def parse(cls, argument: str) -> LmEval:
        """From the text after ``lm_eval:``.

        Raises UsageError for a missing task or bad setting and MissingExtraError when lm-eval is not installed.
        """
        task, _, query = argument.partition("?")
        if not task:
            raise UsageError("lm_eval needs a task: lm_eval:hellaswag, or lm_eval:FILE.yaml for a local one")
        require_extra("lm_eval", "eval", f"task lm_eval:{task}")
        made = cls(task, **dict(_setting(part) for part in query.split("&") if part))
        if made.is_file and not Path(task).is_file():
            raise UsageError(f"lm_eval task file {task} does not exist")
        return made

    @property
    def is_file(self) -> bool:
        """True when the task is a local YAML file."""
        return is_task_file(f"lm_eval:{self.task}")

    @property
    def name(self) -> str:
        """``lm_eval:`` and the task; a file goes by its name."""
        return f"lm_eval:{Path(self.task).name if self.is_file else self.task}"

    def measure(
        self, models: Mapping[str, PreTrainedModel], tokenizer: PreTrainedTokenizerBase | None, settings: Settings
    ) -> list[Metric]:
        """One metric per task and score, such as ``hellaswag acc``, its parts the scores of the items where they have
        any. Raises UsageError and DataError.
        """
        manager = self._manager()
        results = {}
        for done, (name, model) in enumerate(models.items(), start=1):
            results[name] = self._run(model, settings.tokenizers.get(name, tokenizer), manager, settings)
            settings.progress(self.name, done, len(models))
        return _metrics(results, self.limit)

    def check(self, model: Any, tokenizer: PreTrainedTokenizerBase | None, settings: Settings) -> None:
        """Load the task and its data. Raises UsageError and DataError."""
        self._loaded()

    def check_written(self) -> None:
        """Raises UsageError where an answer is chosen and not written, which a KV cache has no part in.

        The task and its data are loaded for that, so that what is missing is said here too, as a DataError.
        """
        for name, kind in _output_types(self._loaded()).items():
            if kind != "generate_until":
                raise UsageError(
                    f"{self.name}: the answers of {name} are ranked by their likelihood, all at once with the"
                    " prompt, so that a compressed cache is never read: take a task whose answers are written,"
                    " such as lm_eval:longbench_qasper"
                )

    def _loaded(self) -> Mapping[Any, Any]:
        """The tasks that this one stands for; newer versions load flat, older ones groups within groups."""
        manager = self._manager()
        with contextlib.redirect_stdout(sys.stderr), self._one_sentence():
            loaded = manager.load([self.task])["tasks"] if hasattr(manager, "load") else None
            return loaded or manager.load_task_or_group(self.task)

    def _manager(self) -> Any:
        tasks = require_extra("lm_eval.tasks", "eval", self.name)
        if self.is_file:
            return tasks.TaskManager(include_path=str(Path(self.task).parent), include_defaults=False)
        manager = tasks.TaskManager()
        if self.task not in manager.all_tasks:
            raise UsageError(
                f"lm-eval has no task '{self.task}'{nearest(self.task, manager.all_tasks)} (lm-eval ls tasks)"
            )
        return manager

    def _run(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, manager: Any, settings: Settings
    ) -> dict[str, Any]:
        harness = require_extra("lm_eval.evaluator", "eval", self.name)
        wrapper = require_extra("lm_eval.models.huggingface", "eval", self.name)
        seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed"), settings.seed)
        # what lm-eval prints must not mix with results on stdout
        with apart(), evaluating(model), contextlib.redirect_stdout(sys.stderr), self._one_sentence():
            return harness.simple_evaluate(
                wrapper.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=self.batch),
                tasks=[self.task],
                num_fewshot=self.fewshot,
                limit=self.limit,
                task_manager=manager,
                log_samples=True,
                fewshot_random_seed=settings.seed,
                bootstrap_iters=0,
                **seeds,
            )

    @contextlib.contextmanager
    def _one_sentence(self) -> Iterator[None]:
        try:
            yield
        except SecateurError:
            raise
        except (OSError, ValueError, KeyError, RuntimeError, TypeError, ImportError) as error:
            # loading a task reaches through yaml, datasets, the hub and libraries of its own; all of them complain
            # about this task
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise DataError(f"{self.name} can't be run: {reason}") from error


def _output_types(loaded: Mapping[Any, Any]) -> dict[str, str]:
    """What every task answers with, by name; groups hold further tasks."""
    found: dict[str, str] = {}
    for name, task in loaded.items():
        found |= _output_types(task) if isinstance(task, Mapping) else {str(name): str(task.OUTPUT_TYPE)}
    return found


def _setting(part: str) -> tuple[str, int]:
    key, _, value = part.partition("=")
    if key not in QUERY:
        raise UsageError(f"lm_eval has no setting '{key}'{nearest(key, QUERY)} (it has {', '.join(QUERY)})")
    if not value.isdecimal() or (key != "fewshot" and int(value) < 1):
        raise UsageError(f"lm_eval: {key} must be a whole number, got {value!r}")
    return key, int(value)


def _metrics(results: Mapping[str, dict[str, Any]], limit: int | None) -> list[Metric]:
    first = next(iter(results.values()))
    metrics = []
    for task, scores in first["results"].items():
        for key, value in scores.items():
            if isinstance(value, (int, float)) and "," in key and not key.partition(",")[0].endswith("_stderr"):
                metrics.append(_metric(results, first, task, key, limit))
    return metrics


def _metric(
    results: Mapping[str, dict[str, Any]], first: dict[str, Any], task: str, key: str, limit: int | None
) -> Metric:
    score, _, kind = key.partition(",")
    label = f"{task} {score}" if kind == "none" else f"{task} {score} ({kind})"
    better = first.get("higher_is_better", {}).get(task, {}).get(score)
    values = {name: float(result["results"][task][key]) for name, result in results.items()}
    parts = {name: _items(result.get("samples", {}).get(task, []), score, kind) for name, result in results.items()}
    whole = all(parts.values()) and len({len(items) for items in parts.values()}) == 1
    return Metric(label, "", values, better, _protocol(first, task, limit), parts if whole else {})


def _items(samples: list[dict[str, Any]], score: str, kind: str) -> list[float]:
    """The score of every item; none where the score is one of the whole task (a corpus BLEU, a perplexity)."""
    scores = [sample.get(score) for sample in samples if sample.get("filter", "none") == kind]
    numbers = [float(value) for value in scores if isinstance(value, Real)]
    return numbers if len(numbers) == len(scores) else []


def _protocol(first: dict[str, Any], task: str, limit: int | None) -> str:
    from importlib.metadata import version

    counts = first.get("n-samples", {}).get(task)
    items = f"{counts['effective']} of {counts['original']} items" if counts else f"limit {limit or 'none'}"
    shots = first.get("n-shot", {}).get(task, 0)
    # survives pruning or doesn't: see the guide on comparing methods
    how = str(first.get("configs", {}).get(task, {}).get("output_type", "")).replace("_", " ")
    about = f"lm-eval {version('lm-eval')}, task version {first.get('versions', {}).get(task)}, {shots}-shot, {items}"
    return f"{about}, {how}" if how else about
