"""Recovery training of a checkpoint folder, or as part of a run: resumable, written as a whole, told in its report."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.engine.recovering import Recovered, Teacher, recover_decoder
from secateur.errors import ModelLoadError, SecateurError, UsageError
from secateur.healing.recovery import Curve, RecoveryOptions, make_recovery
from secateur.healing.recovery.trained import check_installed
from secateur.models.fingerprint import config_document, display_name, fingerprint
from secateur.models.hub import plain_name
from secateur.models.loading import load_model
from secateur.models.saving import write_checkpoint, write_model
from secateur.models.sources import Source
from secateur.models.vocabulary import fitted
from secateur.plans import Plan, find_plans
from secateur.ranks import ALONE, Ranks, join
from secateur.reading import read_json
from secateur.remote import expanded
from secateur.report import Metric, Report
from secateur.runs.finished import check_run_output
from secateur.runs.folder import RunFolder
from secateur.runs.kept import hint, kept
from secateur.runs.pipeline import Progress, StepResult
from secateur.runs.signals import StopRequest
from secateur.runs.states import StateKeeper, TrainingFolder
from secateur.versions import library_versions, machine

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Healed:
    """What ``heal`` returns: the trained model, its plans, which say that it was trained, and the report."""

    model: PreTrainedModel
    plans: Sequence[Plan]
    report: Report
    recovered: Recovered

    @property
    def curve(self) -> Curve:
        """Loss by step, and held-out perplexity now and then."""
        return self.recovered.curve


def heal(
    model: PreTrainedModel | str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    out: str | Path | None = None,
    train: str = "lora",
    data: str | Path = "builtin",
    teacher: PreTrainedModel | str | Path | None = None,
    loss: str | None = None,
    steps: int | None = None,
    options: Mapping[str, Any] | None = None,
    plan: Plan | Sequence[Plan] | None = None,
    seed: int = 0,
    text_field: str | None = None,
    device: str = "cpu",
    inplace: bool = False,
    html: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Healed:
    """Train a cut model for a while, so that it makes up for what was removed; what was removed stays removed.

    ``model`` is one in memory, of which a copy is trained (with ``inplace`` it itself), or a checkpoint folder, whose
    plan is found in it and whose result is written to ``out``; a run that was killed or stopped goes on with
    ``resume`` and gives the same weights. ``train``: ``lora`` (adapters, merged at the end), ``full``, or ``norms``
    (norms and biases). ``teacher`` is the dense model, by name or in memory. ``loss`` joins ``ce`` (the text itself),
    ``kl`` (the teacher's predictions) and ``hidden`` (its hidden states) by +, each with a weight behind *; by default
    it is ``kl`` with a teacher and ``ce`` without. ``steps`` of 4 windows of 256 tokens each; ``options`` are the
    others of ``RecoveryOptions``. ``plan`` cut the model in memory; its masks are kept to the bit. ``data`` is what
    ``calibration`` takes in ``plan``; its last windows are held out and measured.
    In a process group, or in processes that torchrun has started, all ranks call this together.
    Raises UsageError, DataError, ModelError, PlanMismatchError, OutputError, MissingExtraError, NonFiniteError when a
    loss is NaN, and Stopped (a KeyboardInterrupt) when a signal came.
    """
    chosen = chosen_options(train=train, data=data, loss=loss, steps=steps, seed=seed, options=options)
    job = _Job(chosen, device, text_field, trust_remote_code, progress or (lambda stage, done, total: None))
    if not isinstance(model, str | Path):
        if out is not None or resume:
            raise UsageError("out= and resume= are for a checkpoint folder: save a model in memory with secateur.save")
        plans = [] if plan is None else [plan] if isinstance(plan, Plan) else list(plan)
        return _in_memory(job, model, tokenizer, plans, teacher, inplace)
    if out is None:
        raise UsageError("give a folder for the trained checkpoint with out= (--out)")
    if plan is not None or tokenizer is not None:
        raise UsageError("a checkpoint folder brings its plan and its tokenizer: leave plan= and tokenizer= out")
    return _of_folder(job, model, out, teacher, html=html, resume=resume, overwrite=overwrite)


def chosen_options(
    *,
    train: str = "lora",
    data: str | Path = "builtin",
    loss: str | None = None,
    steps: int | None = None,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
) -> RecoveryOptions:
    """The options that these arguments of ``heal`` stand for. Raises OptionError, and MissingExtraError where what they
    train needs a library that isn't here.
    """
    given = {"loss": loss, "steps": steps}
    chosen = make_recovery(
        {"train": train, "seed": seed, **{k: v for k, v in given.items() if v is not None}, **(options or {})}
    )
    check_installed(chosen.train)
    return replace(chosen, data=chosen.data or str(data))


@dataclass(frozen=True)
class _Job:
    options: RecoveryOptions
    device: str
    text_field: str | None
    trust_remote_code: bool
    progress: Progress

    def load(self, name: str | Path, dtype: str = "auto", ranks: Ranks = ALONE) -> tuple[Any, Any]:
        model, tokenizer = load_model(
            name,
            dtype=dtype,
            device=ranks.device(self.device),
            trust_remote_code=self.trust_remote_code,
            progress=self.progress if ranks.main else None,
        )
        model.secateur_name = plain_name(str(name))  # type: ignore[assignment]
        return model, tokenizer

    def teacher(self, given: Any, ranks: Ranks = ALONE) -> Teacher | None:
        if given is None or isinstance(given, Teacher):
            return given
        if isinstance(given, str | Path):
            return Teacher(*self.load(given, "float32", ranks))
        return Teacher(given)


def _in_memory(job: _Job, model: Any, tokenizer: Any, plans: Sequence[Plan], teacher: Any, inplace: bool) -> Healed:
    chosen = job.teacher(teacher)
    job.options.terms(chosen is not None)
    trained = model if inplace else copy.deepcopy(model)
    recovered = recover_decoder(
        trained,
        fitted(tokenizer, plans),
        job.options,
        plans=plans,
        teacher=chosen,
        text_field=job.text_field,
        progress=job.progress,
    )
    report = _told(None, recovered, display_name(model))
    return Healed(trained, recovered.on(plans), report, recovered)


def _of_folder(
    job: _Job, source: str | Path, out: str | Path, teacher: Any, *, html: bool, resume: bool, overwrite: bool
) -> Healed:
    job.options.terms(teacher is not None)
    finished = check_run_output(out, resume=resume, overwrite=overwrite)
    ranks = join()
    with ranks.together():
        model, tokenizer = job.load(source, ranks=ranks)
        plans = plans_in(source)
        named = str(teacher) if isinstance(teacher, str | Path) else display_name(teacher) if teacher else ""
        document = {
            "recovery": asdict(job.options) | {"teacher": named, "text_field": job.text_field},
            "model": str(source),
            "weights": fingerprint(Source(model)).weights,
            "config": config_document(model),
            "versions": library_versions(),
            "number of ranks": ranks.size,
        }
        chosen = job.teacher(teacher, ranks)
        folder = RunFolder(out, document, resume=resume, overwrite=overwrite, ranks=ranks)
        with kept(folder, resume, ranks) as stop:
            step = TrainingFolder(folder.step(1), stop, hint(out))
            recovered = recover_decoder(
                model,
                tokenizer,
                job.options,
                plans=plans,
                teacher=chosen,
                text_field=job.text_field,
                keeper=StateKeeper(step, Curve.from_json, ranks),
                ranks=ranks,
                progress=job.progress if ranks.main else lambda *_: None,
            )
            stop.defer(False)
            folder.complete = True
            healed = recovered.on(plans)
            report = _told(_report_in(source), recovered, display_name(model))

            def write() -> None:
                if finished:
                    folder.remove()
                    return
                write_checkpoint(
                    step.emptied(),
                    out,
                    model,
                    tokenizer,
                    plans=healed,
                    report=report,
                    html=html,
                    format=_format_of(source),
                    base_name=healed[0].model.name if healed else display_name(model),
                )
                folder.finish(step.out)

            ranks.on_main(write)
    return Healed(model, healed, report, recovered)


def heal_step(
    path: Path,
    result: StepResult | None,
    options: RecoveryOptions,
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    teacher: Teacher | None,
    calibration: str,
    text_field: str | None,
    format: str,
    max_shard_size: int,
    device: str,
    trust_remote_code: bool,
    earlier: Sequence[Plan],
    stop: StopRequest,
    hint: str,
    ranks: Ranks,
    progress: Progress,
) -> tuple[StepResult, Recovered] | None:
    """Train what a step of a run has written; the first of the ``ranks`` has the result, in a folder of its own.

    ``earlier`` are the plans of the steps before, whose zeros stay, too.
    """
    started = time.perf_counter()
    step = TrainingFolder(path, stop, hint)
    plans = [*earlier, result.plan] if result is not None else []
    if ranks.size > 1:
        for number, plan in enumerate(plans, start=1):
            plan.save(path / "plan" / f"step-{number}", overwrite=True)
    place = ranks.on_main(lambda: str(result.folder) if result is not None else "")
    plans = plans or plans_in(path)
    model, _ = load_model(place, dtype="auto", device=ranks.device(device), trust_remote_code=trust_remote_code)
    recovered = recover_decoder(
        model,
        tokenizer,
        options,
        plans=plans,
        teacher=teacher,
        source=calibration,
        text_field=text_field,
        keeper=StateKeeper(step, Curve.from_json, ranks),
        ranks=ranks,
        progress=progress,
    )
    if result is None:
        ranks.meet()
        return None
    plain = not write_model(model, step.emptied(), format, max_shard_size)
    ranks.meet()
    seconds = {**result.seconds, "heal": time.perf_counter() - started}
    return StepResult(recovered.on(plans)[-1], step.out, plain, {}, seconds), recovered


def plans_in(source: str | Path) -> list[Plan]:
    """The plans of a checkpoint folder, in the order of their steps; none where it holds none. Raises PlanError."""
    folder = expanded(source)
    if not ((folder / "plan").is_dir() or (folder / "plan.json").is_file()):
        return []
    return [Plan.load(path) for path in find_plans(folder)]


def _report_in(source: str | Path) -> Report | None:
    """The report of a checkpoint; None where there is none that can be read."""
    try:
        return Report.from_dict(read_json(expanded(source) / "report.json", ModelLoadError))
    except (SecateurError, OSError, TypeError, KeyError, ValueError, AttributeError):
        return None


def _format_of(source: str | Path) -> str:
    config = expanded(source) / "config.json"
    stored: Any = read_json(config, ModelLoadError) if config.is_file() else {}
    return "packed" if stored.get("secateur", {}).get("packed") else "dense"


def _told(report: Report | None, recovered: Recovered, name: str) -> Report:
    """The report of what was trained, with this training at its end."""
    if report is None:
        report = Report(model=name, method="", options={}, requested="", achieved=0.0)
        report.versions, report.machine = library_versions(), machine()
    curve, record = recovered.curve, recovered.record
    values = {} if curve.teacher is None else {"dense": curve.teacher}
    values |= {"pruned": record.before, "healed": record.after}
    options = record.options
    protocol = (
        f"{record.data.source}; last windows of {options['length']} tokens, which were not trained on;"
        f" {options['length'] - 1} predictions a window"
    )
    held_out = Metric("held-out perplexity", "", values, higher_is_better=False, protocol=protocol)
    report.metrics = [held_out, *report.metrics]
    report.recoveries = [*report.recoveries, recovered.section()]
    report.seconds["heal"] = report.seconds.get("heal", 0.0) + curve.seconds
    return report
