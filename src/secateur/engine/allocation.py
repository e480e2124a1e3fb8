"""How the sparsity is spread over matrices before the first of them is decided."""

from __future__ import annotations

from itertools import chain

from secateur.allocators import Allocator, BlockWeights, Measuring, Part, matrix_sparsities, with_sparsity
from secateur.allocators.base import Wishes
from secateur.allocators.trying import Trying
from secateur.engine.run import Run
from secateur.errors import DataError, UsageError
from secateur.keeping import Decision, Keeper
from secateur.methods import WeightMethod
from secateur.models.decoders import matrix_roles
from secateur.searching import LevelTrials, level_tensors


def allocated(run: Run, method: WeightMethod) -> dict[str, WeightMethod]:
    """The method as it prunes every matrix, by module; nothing without an allocator."""
    if run.allocator is None:
        return {}
    parts = _parts(run)
    sparsities = run.ranks.on_main(run.keeper.allocated)
    if sparsities is None:
        sparsities = _allocate_matrices(run, run.allocator, method, parts)
    return {part.module: with_sparsity(method, part, sparsities[part.module]) for part in parts}


def _allocate_matrices(run: Run, allocator: Allocator, method: WeightMethod, parts: list[Part]) -> dict[str, float]:
    """Look at the dense model for the allocator, and keep what it gives every matrix."""
    aside = run.keeper.aside("allocation")
    if isinstance(allocator, Trying) and run.ranks.size > 1:
        raise UsageError(f"allocator {allocator.name} tries whole models out in one process: leave torchrun out")
    if allocator.measures:
        measuring = Measuring(allocator, method)
        how = (run.dtype, run.batch_tokens, run.progress, aside, run.hidden.elsewhere(aside.hidden))
        _measure(measuring, Run(measuring, run.source, run.tokens, *how, run.allocator_statistics, run.ranks))

    def choose() -> dict[str, float]:
        if isinstance(allocator, Trying):
            wished = _searched(run, allocator, method, parts, aside)
            found = matrix_sparsities(allocator, method, parts, wished=wished)
        else:
            layers = range(run.layers if allocator.measures else 0)
            measured = [aside.ranked(f"block.{layer}") for layer in layers]
            found = matrix_sparsities(allocator, method, parts, measured)
        run.keeper.allocate(found)
        return found

    return run.ranks.on_main(choose)


def _searched(run: Run, search: Trying, method: WeightMethod, parts: list[Part], aside: Keeper) -> Wishes:
    """The sparsities that a search over whole models finds."""
    tokens = run.tokens
    if tokens is None:
        raise DataError(f"allocator {search.name} needs calibration data: give a tokenizer and a calibration text")
    trials = LevelTrials(
        run.source,
        run.anatomy.matrices,
        tokens.ids,
        aside,
        dtype=run.dtype,
        generations=getattr(search, "generations", 0),
        progress=run.progress,
    )
    return search.at(parts, search.run(parts, method.sparsity, trials), method.sparsity)


def _parts(run: Run) -> list[Part]:
    """The matrices as allocators see them."""
    roles = matrix_roles(run.source.model)
    return [Part(m.module, m.layer, roles.get(m.module, ""), m.shape) for m in run.anatomy.matrices]


def _measure(measuring: Measuring, run: Run) -> None:
    """What the allocator needs of every block of the dense model, kept aside."""
    allocator, method = measuring.allocator, measuring.method
    for layer in run.blocks("allocate"):
        modules = [m.module for m in run.anatomy.matrices if m.layer == layer]
        if allocator.observes == "blocks":
            block = BlockWeights((), {"": run.observe_block(layer)})
        else:
            _, seen = run.observe(layer, modules, advance=True)
            block = BlockWeights(tuple(run.target(m, "weight", layer, name=m) for m in modules), seen)
        if isinstance(allocator, Trying):
            made = allocator.prune_levels(block, method, _parts(run))
            ranked = dict(chain(*(level_tensors(*m).items() for m in zip(modules, made, strict=True))))
        else:
            ranked = {f"block.{layer}": allocator.measure(block, method)}
        run.keeper.keep(layer, Decision(), final=False, walk=run.walk, ranked=ranked)
        del block
