"""One step of a run: observe, decide, cut and write, block by block, from a source to a checkpoint folder."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from secateur.allocators import Measuring
from secateur.engine import decide
from secateur.methods import Method, reach
from secateur.models.decoders import decoder_anatomy
from secateur.models.fingerprint import config_hash, fingerprint
from secateur.models.sources import Source
from secateur.models.surgery import check_fits
from secateur.observe.activations import Activations
from secateur.observe.store import statistics_folder
from secateur.plans import Plan
from secateur.provenance import Provenance
from secateur.ranks import ALONE, Ranks
from secateur.runs.checking import Progress, outside_checked
from secateur.runs.cutting import BlockCutter
from secateur.runs.folder import DiskKeeper, StepFolder
from secateur.runs.output import CheckpointWriter, kept_layers
from secateur.tensorfiles import Tally
from secateur.versions import library_versions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from secateur.observe.calibration import Tokens


@dataclass(frozen=True)
class Output:
    """How a checkpoint is written: ``format`` is dense or packed, ``max_shard_size`` is in bytes."""

    format: str = "dense"
    max_shard_size: int = 5 * 10**9


@dataclass(frozen=True)
class Resources:
    """What a step may use: ``batch_tokens`` per forward; bytes of hidden states before they go to disk."""

    dtype: torch.dtype
    batch_tokens: int = 2048
    activation_memory: int | None = None


@dataclass(frozen=True)
class StepResult:
    """What a step gave: its plan, the folder of the checkpoint, whether it is plain, seconds by stage.

    ``tallies`` are those of the weight files that this process wrote, by name; ``tokenizer`` is that of the model as it
    is now.
    """

    plan: Plan
    folder: Path
    plain: bool
    tallies: Mapping[str, Tally]
    seconds: Mapping[str, float]
    tokenizer: PreTrainedTokenizerBase | None = None


def plan_step(
    step: StepFolder,
    method: Method,
    source: Source,
    tokens: Tokens | None,
    *,
    resources: Resources,
    output: Output | None,
    seed: int,
    progress: Progress,
    statistics: Path | None = None,
    ranks: Ranks = ALONE,
    allocation: Measuring | None = None,
    latency_table: Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[DiskKeeper, BlockCutter]:
    """Decide by ``method``, and by an allocator where there is one; what is done already is taken as it is.

    All ``ranks`` observe; the first one writes. Blocks are cut on the way unless ``output`` is None. Masks and values
    of the plan stay in the folder. Raises Stopped at the next boundary once a signal has come.
    """
    provenance = Provenance(
        method=method.name,
        options=method.options(),
        model=fingerprint(source),
        calibration=tokens.info if tokens is not None else None,
        seed=seed,
        dtype=str(resources.dtype).removeprefix("torch."),
        versions=library_versions(),
        allocation=allocation.provenance if allocation else None,
        coverage=reach(method, decoder_anatomy(source.model)),
    )

    def kept(observer: Method | Measuring | None) -> Path | None:
        how = (resources.dtype, resources.batch_tokens)
        return statistics_folder(statistics, provenance.model, config_hash(source.model), tokens, observer, *how)

    cutter = BlockCutter(source, provenance, output.format if output else "dense")
    keeper = DiskKeeper(step, method, cutter, ranks, cut=output is not None)
    # all have read the journal before one writes to it
    ranks.meet()
    # again when a run goes on: it may have died before all was looked at
    with outside_checked(source, progress) if ranks.main else nullcontext(progress) as report:
        if not keeper.complete:
            decide(
                method,
                source,
                tokens,
                dtype=resources.dtype,
                batch_tokens=resources.batch_tokens,
                progress=report,
                keeper=keeper,
                hidden=Activations(limit=resources.activation_memory, folder=keeper.hidden),
                statistics=kept(method),
                ranks=ranks,
                allocator=allocation.allocator if allocation else None,
                allocator_statistics=kept(allocation),
                latency_table=latency_table,
                tokenizer=tokenizer,
            )
    return keeper, cutter


def prune_step(
    step: StepFolder,
    method: Method,
    source: Source,
    tokens: Tokens | None,
    *,
    output: Output,
    progress: Progress,
    ranks: Ranks = ALONE,
    **how: Any,
) -> StepResult | None:
    """``plan_step``, then the checkpoint in ``step.out``; takes the arguments of ``plan_step``.

    The first of the ``ranks`` writes, and has the result.
    """
    started = time.perf_counter()
    keeper, cutter = plan_step(step, method, source, tokens, output=output, progress=progress, ranks=ranks, **how)

    def finish() -> StepResult:
        plan = keeper.finish()
        planned = time.perf_counter()
        written = _write_cut(step, plan, source, cutter, output, progress)
        return StepResult(plan, step.out, *written, {"plan": planned - started, "cut": time.perf_counter() - planned})

    result = finish() if ranks.main else None
    ranks.meet()
    return result


def apply_step(step: StepFolder, plan: Plan, source: Source, *, output: Output, progress: Progress) -> StepResult:
    """Cut ``source`` by an existing plan. Raises PlanMismatchError when it was made for other shapes."""
    started = time.perf_counter()
    check_fits(plan, fingerprint(source))
    provenance = next(p for p in plan.provenance if p.options.get("heads") == plan.head_unit or plan.head_unit == "kv")
    cutter = BlockCutter(source, provenance, output.format)
    with outside_checked(source, progress) as report:
        written = _write_cut(step, plan, source, cutter, output, report)
    return StepResult(plan, step.out, *written, {"cut": time.perf_counter() - started})


def _write_cut(
    step: StepFolder, plan: Plan, source: Source, cutter: BlockCutter, output: Output, progress: Progress
) -> tuple[bool, Mapping[str, Tally]]:
    """The blocks that aren't written yet, then the checkpoint; whether stock transformers loads it, and its tallies."""
    kept, written = kept_layers(plan, cutter.layers), step.written()
    # rotated blocks are read as a whole
    cutter.expect(layer for layer in kept if layer not in written and not plan.rotations)
    for done, layer in enumerate(kept, start=1):
        if layer not in written:
            cutter.write(layer, plan, step.file("weights", layer))
            step.add(cut=layer)
            progress("cut", done, len(kept))
            step.check_stop(f"cutting {done} of {len(kept)} blocks")

    def shard_done(name: str, number: int, count: int) -> None:
        step.add(shard=name)
        progress("write", number, count)
        step.check_stop(f"writing {number} of {count} files")

    writer = CheckpointWriter(source, plan, partial(step.file, "weights"), step.out, output.max_shard_size)
    remote, tallies = writer.write(step.journal.of("shard"), shard_done)
    return not remote, tallies
