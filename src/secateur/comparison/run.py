"""Running a comparison: a sweep over all methods, budgets and seeds, and what its points and plans say together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from secateur.comparison.asked import TOLERANCE, Asked, ask, split
from secateur.comparison.overlap import jaccard
from secateur.comparison.rows import Comparison, Overlap, compare_records
from secateur.errors import UsageError
from secateur.plans import Plan
from secateur.report.folder import write_study
from secateur.sweep.expected import Expected, announce_rest
from secateur.sweep.pools import InSequence, open_pool
from secateur.sweep.runner import Results, check_folder, make_job, open_journal, resumable, run_sweep
from secateur.sweep.worker import Worker

DOCUMENT, PAGE = "compare.json", "compare.html"
_TIMED = "request"


def compare(
    model: str | Path,
    *,
    methods: str | Sequence[str],
    sparsity: float | Sequence[float],
    out: str | Path,
    seeds: Sequence[int] = (0,),
    tasks: str | Sequence[str] = ("perplexity:builtin",),
    latency: bool = False,
    allocate: str | None = None,
    partial: bool = False,
    heal: str | None = None,
    target: str | None = None,
    calibration: str | Path = "builtin",
    samples: int = 64,
    length: int = 512,
    text_field: str | None = None,
    windows: int = 40,
    dtype: str = "auto",
    device: str = "cpu",
    tolerance: float = TOLERANCE,
    workers: int = 1,
    address: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    plugins: Sequence[str] = (),
    progress: Callable[[str, int, int], None] | None = None,
    announce: Callable[[Expected], None] | None = None,
) -> Comparison:
    """Hold methods against each other on one model, at equal budgets, beside the dense model.

    ``methods`` are names, each with options of its own where it needs some (``["flap", "osscar:damping=0.1"]``);
    ``sparsity`` one or several fractions removed. Every one of the ``seeds`` draws the calibration windows anew, and
    all methods run with it but those that neither read text, nor draw, nor are trained: they run once. ``tasks`` are
    those of ``evaluate``; the first decides who is best. ``latency`` measures a request as well, in turns with the
    dense model. ``allocate``, ``heal`` and ``target`` are those of ``plan``, for all methods alike, and so are
    ``partial`` and the calibration text; where ``heal`` trains, the first task is measured before that as well.
    Whoever removes another fraction of the blocks' linear weights than was asked for, by more than ``tolerance``, is
    shown and has no part in the verdict. What can be shared is computed once. Several ``workers``, processes of the
    Ray at ``address`` or of one on this machine, take a point each at the same time.

    ``out`` gets ``compare.json``, ``compare.html`` and the plan of every point; ``resume`` goes on with a comparison
    that was stopped or killed, ``overwrite`` begins anew. ``plugins`` are those that were loaded. ``announce`` is told
    first how long the points take where one worker runs them.
    Raises UsageError for what can't be compared, before anything is measured, OutputError for the folder,
    MissingExtraError for an ``address`` without Ray, and what ``load`` raises. A point that fails is in the result as
    failed.
    """
    if workers < 1:
        raise UsageError(f"a comparison needs one worker at least, got {workers}")
    if latency and (workers > 1 or address is not None):
        raise UsageError("a latency is measured by one worker, with nothing beside it: leave out workers, or latency")
    step = {"allocate": allocate, "heal": heal, "target": target, "partial": partial or None}
    recipe = {
        "model": str(model),
        "steps": [{key: value for key, value in step.items() if value is not None}],
        "calibration": {
            "source": str(calibration),
            "samples": samples,
            "length": length,
            "text_field": text_field,
            # every seed has a calibration text of its own, so that its chance is part of what the seeds differ by
            "random_windows": True,
        },
        # counted for the table, whatever else is measured
        "evaluate": list(dict.fromkeys([*(split(tasks) or ["perplexity:builtin"]), "macs"])),
        "windows": windows,
        "dtype": dtype,
        "device": device,
    }
    budgets = [sparsity] if isinstance(sparsity, int | float) else sparsity
    asked = ask(recipe, methods, budgets, seeds, tolerance)
    _check_tasks(asked)
    job = make_job(
        asked.sweep,
        Path(out),
        trust_remote_code=trust_remote_code,
        plugins=tuple(plugins),
        timed=(_TIMED,) if latency else (),
        # what the training was worth: by the task that decides
        untrained=tuple(asked.sweep.base.evaluate[:1]),
    )
    check_folder(Path(out), resume=resume, overwrite=overwrite)
    worker = Worker(job)
    # before the folder is made, or emptied
    worker.check(asked.sweep.points)
    workers = min(workers, asked.sweep.size)
    pool, notes = open_pool(job, workers, address, workers, what="points", own=lambda job: worker)
    if not isinstance(pool, InSequence):
        worker.release()
        if workers > 1:
            notes.append(f"{workers} workers took points at the same time: seconds are longer than those of one alone")
    with closing(pool):
        journal, finished = open_journal(Path(out), job, resume=resume, overwrite=overwrite)
        with resumable(journal, asked.sweep):
            announce_rest(asked.sweep, finished, pool, announce)
            results = run_sweep(asked.sweep, pool, journal, finished, progress or _silent)
            results.notes[:0] = notes
            comparison = compare_records(asked, results, _overlaps(asked, results, Path(out), worker))
            missing = write_comparison(comparison, Path(out))
    return replace(comparison, notes=(*comparison.notes, *missing))


def write_comparison(comparison: Comparison, folder: Path) -> list[str]:
    """``compare.json`` and ``compare.html``, each whole or not at all; returns notes on what is missing."""

    def render() -> str:
        from secateur.comparison import page

        return page.render(comparison)

    return write_study(folder, DOCUMENT, comparison.to_dict(), PAGE, render)


def _check_tasks(asked: Asked) -> None:
    from secateur.evaluation import make_task

    for task in asked.sweep.base.evaluate:
        make_task(task)


def _overlaps(asked: Asked, results: Results, folder: Path, worker: Worker) -> list[Overlap]:
    """Of every budget, the plans of the first seed."""
    done = {record.key: record for record in results.points if record.done}
    found = []
    for sparsity in asked.sparsities:
        first = {method: asked.points[method, sparsity][0].key for method in asked.contenders}
        plans = {m: Plan.load(folder / "plans" / done[key].name) for m, key in first.items() if key in done}
        if len(plans) > 1:
            found.append(Overlap(sparsity, tuple(plans), jaccard(plans, worker.anatomy)))
    return found


def _silent(stage: str, done: int, total: int) -> None:
    return None
