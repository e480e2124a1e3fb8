"""A training that leaves a folder: kept while it goes on, written as a whole at its end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.errors import SecateurError, UsageError
from secateur.loop import Progress
from secateur.models.saving import write_checkpoint
from secateur.networks.applying import module_fingerprint
from secateur.networks.kinds import FILES
from secateur.networks.saving import check_module_finite, save_network, write_network
from secateur.ranks import join
from secateur.report import Report
from secateur.runs.finished import check_run_output
from secateur.runs.folder import RunFolder, run_path
from secateur.runs.kept import hint, kept
from secateur.runs.states import StateKeeper, TrainingFolder
from secateur.trainer.curve import TrainingCurve
from secateur.trainer.cutting import cut_network
from secateur.trainer.examples import load_examples
from secateur.trainer.networks import Network, open_network
from secateur.trainer.recipe import TrainRecipe
from secateur.trainer.result import report_of
from secateur.trainer.tracking import check_trackers, tracking
from secateur.trainer.training import Trained, train
from secateur.versions import library_versions


@dataclass(frozen=True)
class TrainedRun:
    """What ``run_training`` returns: the trained network in eval mode, cut where its channels left, what training gave,
    and the report.
    """

    network: Network
    trained: Trained
    report: Report


def run_training(
    recipe: TrainRecipe,
    *,
    out: str | Path | None = None,
    html: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = lambda stage, done, total: None,
) -> TrainedRun:
    """Train as the recipe says and write the result to ``out``, or to the folder that it names.

    A language model is written as a checkpoint with its plan, any other network as weights with the plan and the
    lines that load it. Where whole channels left it is cut, and held against the one with zeros; should they disagree,
    the zeros are written, and then it is an UnsupportedModelError. A run that was killed or stopped goes on with
    ``resume`` and gives the same weights. In processes that torchrun has started, all ranks call this together. Raises
    UsageError, DataError, ModelError, OutputError, MissingExtraError, NonFiniteError, and Stopped (a KeyboardInterrupt)
    when a signal came.
    """
    out = out or recipe.out
    if out is None:
        raise UsageError("give a folder for the trained network with --out (out)")
    finished = check_run_output(out, resume=resume, overwrite=overwrite)
    check_trackers(recipe.track)
    ranks = join()
    with ranks.together():
        # where the result goes, and who watches, changes nothing
        said = recipe.model_dump(exclude={"out", "track"})
        # of several ranks each has its own
        recipe = recipe.model_copy(update={"device": ranks.device(recipe.device)})
        network = open_network(recipe, trust_remote_code=trust_remote_code, progress=progress if ranks.main else None)
        examples = load_examples(recipe, network.module, network.tokenizer)
        steps = recipe.length(examples.count)
        if recipe.sparsifier is not None:
            recipe.sparsifier.made(steps, recipe.seed)
        document = {
            "training": said,
            "network": module_fingerprint(network.module).model_dump(),
            "data": examples.fingerprint,
            "versions": library_versions(),
            "number of ranks": ranks.size,
        }
        folder = RunFolder(out, document, resume=resume, overwrite=overwrite, ranks=ranks)
        with kept(folder, resume, ranks) as stop:
            step = TrainingFolder(folder.step(1), stop, hint(out))
            logs = run_path(out).with_suffix(".logs")
            names = recipe.track if ranks.main else []
            with tracking(names, Path(out).name, logs, said, recipe.rate(steps)) as watch:
                trained = train(
                    network.module,
                    examples,
                    recipe,
                    keeper=StateKeeper(step, TrainingCurve.from_json, ranks),
                    watch=watch,
                    ranks=ranks,
                    progress=progress if ranks.main else lambda *_: None,
                )
            stop.defer(False)
            folder.complete = True
            dense, notes, failed = network, list[str](), None
            if trained.plan is not None and recipe.sparsifier is not None and recipe.sparsifier.cuts:
                try:
                    network, notes = cut_network(network, trained.plan, examples)
                except SecateurError as error:
                    # a training isn't lost for it
                    failed = error
            report = report_of(recipe, dense, network, examples, trained)
            report.notes += notes
            write = _writing(recipe, network, trained, report, folder, step, html, overwrite)
            ranks.on_main(folder.remove if finished else write)
    if failed is not None:
        raise type(failed)(f"{out} holds the network with its zeros, and not cut: {failed}")
    return TrainedRun(network, trained, report)


def _writing(
    recipe: TrainRecipe,
    network: Network,
    trained: Trained,
    report: Report,
    folder: RunFolder,
    step: TrainingFolder,
    html: bool,
    overwrite: bool,
) -> Callable[[], None]:
    def write() -> None:
        out, module, plan = folder.out, network.module, trained.plan
        made: dict[str, Any] = {"factory": network.factory, "arguments": recipe.model.options, "html": html}
        if recipe.data.text is not None:
            plans = [plan] if plan is not None else []
            told: dict[str, Any] = {"plans": plans, "report": report, "html": html, "format": recipe.format}
            write_checkpoint(step.emptied(), out, module, network.tokenizer, **told)
        elif Path(out).suffix in FILES:
            save_network(module, out, plan=plan, report=report, overwrite=overwrite, **made)
            folder.remove()
            return
        else:
            check_module_finite(module)
            write_network(step.emptied(), module, out, plan, report, **made)
        folder.finish(step.out)

    return write
