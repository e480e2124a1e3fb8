"""A whole run: every step of a recipe from a model to a checkpoint folder, resumable, then measured and documented."""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from secateur.errors import OutputError, UsageError
from secateur.healing.recovery import RecoveryOptions, split_heal
from secateur.methods import Method
from secateur.models.decoders import decoder_anatomy
from secateur.models.fingerprint import config_document, fingerprint
from secateur.models.loading import check_sums, computing_device, load_model, locate
from secateur.models.opening import open_source
from secateur.models.saving import document_folder
from secateur.models.shards import parse_size
from secateur.models.sources import CheckpointSource, Source
from secateur.models.vocabulary import fitted_to
from secateur.observe.calibration import Tokens, load_tokens
from secateur.observe.precision import compute_dtype
from secateur.plans import Plan
from secateur.ranks import ALONE, Ranks, join
from secateur.reading import read_json
from secateur.recipes import Recipe, Step, load_recipe, make_recipe, merge_reports
from secateur.remote import is_url, place
from secateur.report import Report
from secateur.report.build import build_report, with_zeros_counted
from secateur.runs.finished import check_run_output
from secateur.runs.folder import RunFolder, StepFolder, read_document, run_path
from secateur.runs.kept import hint, kept
from secateur.runs.pipeline import Output, Progress, Resources, StepResult, plan_step, prune_step
from secateur.runs.signals import StopRequest
from secateur.structure.lexicon import VOCABULARY
from secateur.versions import library_versions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from secateur.engine.recovering import Recovered

# (the dense model, the compute dtype), before any work
Announce = Callable[[Source, torch.dtype], None]
# (the dense model, its tokenizer), before any work, for what would only fail when all is done
Check = Callable[[Source, "PreTrainedTokenizerBase | None"], None]
# (the dense model, its tokenizer, what the last step gave, report to complete)
Measure = Callable[[Source, "PreTrainedTokenizerBase | None", StepResult, Report], None]


@dataclass
class Options:
    """What a run takes beside its recipe; see ``secateur.run``."""

    resume: bool = False
    overwrite: bool = False
    html: bool = False
    trust_remote_code: bool = False
    allow_pickle: bool = False
    statistics: Path | None = None
    progress: Progress = field(default=lambda stage, done, total: None)
    announce: Announce | None = None
    check: Check | None = None
    measure: Measure | None = None


def run(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    html: bool = False,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    statistics: str | Path | None = None,
    progress: Progress | None = None,
) -> Report:
    """Prune a checkpoint block by block, without ever loading it as a whole, and write the result.

    ``recipe`` is a recipe, its mapping, or the path of its YAML file; ``model`` and ``out`` must be in it. What is
    finished is kept in ``OUT.run`` until the end: after a stop, a crash or a full disk the same call with ``resume``
    goes on from the last finished block and gives the same bytes. ``statistics`` is a folder for statistics that
    several runs share.
    In a process group, or in processes that torchrun has started, all ranks call this together, share the calibration
    windows, and get the same report or error; see ``docs/guides/many-devices.md``.
    Raises what ``secateur.plan`` raises, OutputError, and Stopped (a KeyboardInterrupt) when a signal came.
    """
    if not isinstance(recipe, Recipe):
        if isinstance(recipe, Mapping):
            recipe = make_recipe(recipe, "recipe")
        else:
            recipe = load_recipe(recipe, trust_remote_code=trust_remote_code)
    return run_recipe(
        recipe,
        Options(
            resume=resume,
            overwrite=overwrite,
            html=html,
            trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
            statistics=Path(statistics) if statistics else None,
            progress=progress or (lambda stage, done, total: None),
        ),
    )


def run_recipe(recipe: Recipe, options: Options) -> Report:
    """``run`` with whole options; ``measure`` completes the report before it is written."""
    recipe = recipe.staged()
    ranks = join()
    with ranks.together():
        return _run_on(ranks, recipe, options if ranks.main else replace(options, progress=lambda *_: None))


def _run_on(ranks: Ranks, recipe: Recipe, options: Options) -> Report:
    if recipe.model is None or recipe.out is None:
        raise UsageError("a run needs a model and an output folder: give both in the recipe")
    recipe.check_methods()
    recipe.check_installed()
    out = recipe.out
    finished = check_run_output(out, resume=options.resume, overwrite=options.overwrite)
    previous = read_document(run_path(out)) if options.resume else {}
    name, remote_code = recipe.model, options.trust_remote_code
    # what the hub has is fetched once
    ranks.on_main(lambda: locate(name, recipe.revision, remote_code, options.progress))
    source, tokenizer = _open(recipe, options, ranks)
    try:
        recipe.check_reach(decoder_anatomy(source.model))
        # it may be a matter of timing, so one rank decides
        fastest = ranks.on_main(lambda: str(compute_dtype(recipe.dtype, source.device)).removeprefix("torch."))
        dtype = previous.get("dtype") or fastest
        if options.check is not None:
            check = options.check
            ranks.on_main(lambda: check(source, tokenizer))
        ranks.on_main(lambda: _check_texts(recipe, tokenizer))
        if options.announce is not None:
            announce = options.announce
            ranks.on_main(lambda: announce(source, getattr(torch, dtype)))
        document = {
            **_repeated(recipe),
            "model": fingerprint(source).model_dump(),
            "config": config_document(source.model),
            "dtype": dtype,
            "versions": library_versions(),
            "number of ranks": ranks.size,
        }
        folder = RunFolder(out, document, resume=options.resume, overwrite=options.overwrite, ranks=ranks)
        if finished:
            return ranks.on_main(lambda: _finished(folder))
        with kept(folder, options.resume, ranks) as stop:
            runner = _Runner(recipe, options, folder, stop, source, tokenizer, getattr(torch, dtype), ranks)
            return runner.run()
    finally:
        source.close()


def _finished(folder: RunFolder) -> Report:
    """The report of a run of which only its folder was left."""
    # what was uploaded is still here
    written = sorted(folder.path.glob("step-*/**/out")) if is_url(folder.out) else [Path(place(folder.out))]
    found = Report.from_dict(read_json(written[-1] / "report.json", OutputError))
    folder.remove()
    return found


@contextmanager
def planned(recipe: Recipe, options: Options) -> Iterator[list[Plan]]:
    """The plan of every step, for as long as the block lasts; nothing is written but temporary files.

    Raises what ``run`` raises.
    """
    if recipe.model is None:
        raise UsageError("a plan needs a model: give it in the recipe")
    recipe = recipe.staged()
    recipe.check_methods()
    source, tokenizer = _open(recipe, options, ALONE)
    with tempfile.TemporaryDirectory(prefix="secateur-") as temporary:
        try:
            recipe.check_reach(decoder_anatomy(source.model))
            dtype = compute_dtype(recipe.dtype, source.device)
            folder = RunFolder(Path(temporary) / "out", {}, resume=False, overwrite=False)
            stop = StopRequest()
            stop.defer(False)
            yield _Runner(recipe, options, folder, stop, source, tokenizer, dtype, ALONE).plans()
        finally:
            source.close()


def _repeated(recipe: Recipe) -> dict[str, Any]:
    """What a run that goes on must repeat of its recipe, and its steps and trainings, which may be others."""
    told = recipe.model_dump(mode="json", exclude={"out", "evaluate", "windows"})
    steps, trainings = told.pop("steps"), []
    for step in steps:
        step["heal"], training = split_heal(step["heal"], recipe.calibration.seed)
        trainings.append(training and asdict(training))
    # steps before the last one are written dense
    formats = ["dense"] * (len(steps) - 1) + [told.pop("format")]
    written = [{**step, "format": format} for step, format in zip(steps, formats, strict=True)]
    return {"recipe": told, "steps": written, "trainings": trainings}


def _check_texts(recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Whether what is trained on can be read, before hours of planning. Raises DataError and UsageError."""
    from secateur.engine.recovering import check_text

    data = recipe.calibration
    found = [split_heal(step.heal, data.seed)[1] for step in recipe.steps]
    # stages read the same text
    texts = {(one.data, one.whole * one.batch, one.held_out, one.length): one for one in found if one is not None}
    for training in texts.values():
        check_text(training, data.source, tokenizer, data.text_field)


def _open(recipe: Recipe, options: Options, ranks: Ranks) -> tuple[Source, PreTrainedTokenizerBase | None]:
    assert recipe.model is not None
    return open_source(
        recipe.model,
        revision=recipe.revision,
        device=_devices(recipe, ranks),
        trust_remote_code=options.trust_remote_code,
        allow_pickle=options.allow_pickle,
        progress=options.progress,
    )


class _Runner:
    def __init__(
        self,
        recipe: Recipe,
        options: Options,
        folder: RunFolder,
        stop: StopRequest,
        source: Source,
        tokenizer: PreTrainedTokenizerBase | None,
        dtype: torch.dtype,
        ranks: Ranks,
    ) -> None:
        self._ranks = ranks
        self._recipe, self._options, self._folder, self._stop = recipe, options, folder, stop
        self._source, self._dense_tokenizer, self._dtype = source, tokenizer, dtype
        # the next step reads text with what the one before has left
        self._tokenizer = tokenizer
        self._recovered: dict[int, Recovered] = {}
        self._plans: list[Plan] = []

    def run(self) -> Report:
        results, reports = [], []
        for number, step, source in self._sources():
            result = self._step(number, step, source)
            if result is not None:
                report = build_report(result.plan, decoder_anatomy(source.model, heads=result.plan.head_unit))
                report.seconds = dict(result.seconds)
                report.recoveries = [self._recovered[number].section()] if number in self._recovered else []
                results.append(result)
                reports.append(report)
        self._stop.defer(False)
        self._folder.complete = True
        return self._ranks.on_main(lambda: self._finish(results, self._merged(results, reports)))

    def plans(self) -> list[Plan]:
        """The plan of every step; only what a later step needs is cut."""
        plans: list[Plan] = []
        for number, step, source in self._sources():
            if number < len(self._recipe.steps):
                result = self._step(number, step, source)
                assert result is not None
                plans.append(result.plan)
            else:
                plans.append(plan_step(*self._what(number, step, source), output=None, **self._how(step))[0].finish())
        return plans

    def _sources(self) -> Iterator[tuple[int, Step, Source]]:
        """Every step with the model that it starts from: that of the user, then what the step before wrote."""
        for number, step in enumerate(self._recipe.steps, start=1):
            self._folder.finished = number - 1
            if number == 1:
                yield number, step, self._source
                continue
            before = self._folder.step(number - 1)
            training = self._training(self._recipe.steps[number - 2])
            folder = self._training_folder(number - 1, training) / "out" if training else before / "out"
            source, _ = open_source(
                folder,
                device=_devices(self._recipe, self._ranks),
                trust_remote_code=self._options.trust_remote_code,
            )
            try:
                yield number, step, source
            finally:
                source.close()

    def _step(self, number: int, step: Step, source: Source) -> StepResult | None:
        last = number == len(self._recipe.steps)
        output = Output(self._recipe.format if last else "dense", parse_size(self._recipe.max_shard_size))
        result = prune_step(*self._what(number, step, source), output=output, **self._how(step))
        kept = self._ranks.on_main(lambda: result.plan.keep.get(VOCABULARY) if result else None)
        self._tokenizer = fitted_to(self._tokenizer, kept)
        training = self._training(step)
        result = result if training is None else self._heal(number, result, training, output)
        self._plans += [result.plan] if result else []
        return replace(result, tokenizer=self._tokenizer) if result else None

    def _training(self, step: Step) -> RecoveryOptions | None:
        return split_heal(step.heal, self._recipe.calibration.seed)[1]

    def _heal(
        self, number: int, result: StepResult | None, options: RecoveryOptions, output: Output
    ) -> StepResult | None:
        """What the step has written, trained; the dense model of the run is the teacher where one is wanted."""
        from secateur.engine.recovering import Teacher
        from secateur.runs.healing import heal_step

        data = self._recipe.calibration
        wants = {"kl", "hidden"} & set(options.terms(teacher=True))
        self._folder.training = True
        done = heal_step(
            self._training_folder(number, options),
            result,
            options,
            tokenizer=self._tokenizer,
            teacher=Teacher(self._source.whole(torch.float32)) if wants else None,
            calibration=data.source,
            text_field=data.text_field,
            format=output.format,
            max_shard_size=output.max_shard_size,
            device=self._recipe.device,
            trust_remote_code=self._options.trust_remote_code,
            earlier=self._plans,
            stop=self._stop,
            hint=hint(self._folder.out),
            ranks=self._ranks,
            progress=self._options.progress,
        )
        self._folder.training = False
        if done is None:
            return None
        result, self._recovered[number] = done
        return result

    def _training_folder(self, number: int, options: RecoveryOptions) -> Path:
        told = json.dumps(asdict(options), sort_keys=True)
        return self._folder.step(number) / f"heal-{hashlib.sha256(told.encode()).hexdigest()[:8]}"

    def _what(self, number: int, step: Step, source: Source) -> tuple[StepFolder, Method, Source, Tokens | None]:
        method, allocation = self._recipe.words(step)
        folder = StepFolder(self._folder.step(number), self._stop, hint(self._folder.out))
        # one rank reads, so that a text that is fetched or sampled is the same for all
        observes = method.uses_data or (allocation and allocation.needs_text)
        tokens = self._ranks.on_main(lambda: self._tokens(source)) if observes else None
        if tokens is not None:
            self._ranks.on_main(lambda: folder.reads(tokens.info.sha256))
        return folder, method, source, tokens

    def _how(self, step: Step) -> dict[str, Any]:
        memory = self._recipe.activation_memory
        return {
            "resources": Resources(self._dtype, activation_memory=parse_size(memory) if memory else None),
            "seed": self._recipe.calibration.seed,
            "progress": self._options.progress,
            "statistics": self._options.statistics,
            "ranks": self._ranks,
            "allocation": self._recipe.words(step)[1],
            "latency_table": Path(table) if (table := self._recipe.latency_table) else None,
            "tokenizer": self._tokenizer,
        }

    def _tokens(self, source: Source) -> Tokens:
        data = self._recipe.calibration
        model: Any = source.model
        if data.source == "self" and isinstance(source, CheckpointSource):
            # only a whole model writes text
            model, _ = load_model(
                source.folder,
                dtype="auto",
                device=self._recipe.device,
                trust_remote_code=self._options.trust_remote_code,
            )
        return load_tokens(
            data.source,
            self._tokenizer,
            samples=data.samples,
            length=data.length,
            seed=data.seed,
            text_field=data.text_field,
            model=model,
            random_windows=data.random_windows,
        )

    def _merged(self, results: list[StepResult], reports: list[Report]) -> Report:
        merged = merge_reports(reports)
        if len(reports) == 1 or not merged.masked:
            return merged
        source, _ = open_source(results[-1].folder, device="cpu", trust_remote_code=self._options.trust_remote_code)
        try:
            for tally in results[-1].tallies.values():
                source.know(tally.zeros)
            return with_zeros_counted(merged, decoder_anatomy(source.model), lambda name: source.count(name)[1])
        finally:
            source.close()

    def _finish(self, results: list[StepResult], report: Report) -> Report:
        last = results[-1]
        if self._options.measure is not None:
            started = time.perf_counter()
            self._options.measure(self._source, self._dense_tokenizer, last, report)
            report.seconds["evaluate"] = time.perf_counter() - started
        document_folder(
            last.folder,
            self._folder.out,
            tokenizer=self._tokenizer,
            plans=[result.plan for result in results],
            report=report,
            html=self._options.html,
            format=self._recipe.format,
            plain=last.plain,
            tallies=last.tallies,
        )
        self._folder.finish(last.folder)
        return report


def _devices(recipe: Recipe, ranks: Ranks) -> str | list[str]:
    """Where the blocks of a model are opened."""
    if recipe.devices and ranks.size > 1:
        raise UsageError("several devices are for one process: of several ranks, each takes a GPU of its own")
    found = recipe.devices or ranks.device(recipe.device)
    for name in [found] if isinstance(found, str) else found:
        check_sums(computing_device(name))
    return found
