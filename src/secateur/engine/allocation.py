"""How the sparsity is spread over matrices before the first of them is decided."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain

import numpy as np
from torch import Tensor

from secateur.allocate.units import Limits, largest_share
from secateur.allocators import (
    Allocator,
    BlockWeights,
    Follower,
    Measuring,
    Part,
    block_shares,
    matrix_sparsities,
    with_sparsity,
)
from secateur.allocators.base import Wishes
from secateur.allocators.trying import Trying
from secateur.engine.keeping import Decision, Keeper
from secateur.engine.run import Run
from secateur.engine.searching import LevelTrials, level_tensors
from secateur.errors import BudgetError, DataError, UsageError
from secateur.methods import UnitMethod, WeightMethod
from secateur.models.decoders import matrix_roles
from secateur.structure import Group

Fit = Callable[[list[Tensor], Wishes | None], dict[str, float]]
"""(what was measured of the blocks, or what a search has found) → the sparsity of every part, by name"""


def allocated(run: Run, method: WeightMethod) -> dict[str, WeightMethod]:
    """The method as it prunes every matrix, by module; nothing without an allocator."""
    if run.allocator is None:
        return {}
    allocator, parts = run.allocator, _parts(run)

    def fit(measured: list[Tensor], wished: Wishes | None) -> dict[str, float]:
        return matrix_sparsities(allocator, method, parts, measured, wished)

    sparsities = _allocate(run, allocator, method, parts, fit)
    return {part.module: with_sparsity(method, part, sparsities[part.module]) for part in parts}


def shared(run: Run, method: UnitMethod, groups: Sequence[Group], total: int, limits: Limits) -> dict[int, float]:
    """The sparsity of every block, as a fraction of what the sparsity counts of it; nothing without an allocator.

    ``total`` is what it counts of all blocks. Raises BudgetError.
    """
    if run.allocator is None:
        return {}
    allocator = run.allocator
    members = {layer: [g for g in groups if g.layer == layer] for layer in sorted({g.layer for g in groups})}
    sizes = {layer: sum(g.units * limits.cost(g.cost) for g in many) for layer, many in members.items()}
    parts = [Part(f"layers.{layer}", layer, "", (size, 1)) for layer, size in sizes.items()]
    most = [largest_share(many, limits) for many in members.values()]
    # of all that the sparsity counts only heads and neurons can leave
    counted = total / sum(sizes.values())
    asked, possible = method.sparsity * counted, float(np.average(most, weights=list(sizes.values())))
    # before anything is observed
    if asked > possible:
        raise BudgetError(
            f"{asked:.1%} of the heads and neurons can't leave: at most {possible:.1%} can, as every group keeps some"
        )

    def fit(measured: list[Tensor], wished: Wishes | None) -> dict[str, float]:
        return block_shares(allocator, parts, measured, most, asked)

    found = _allocate(run, allocator, method, parts, fit)
    return {part.layer: found[part.module] / counted for part in parts}


def _allocate(run: Run, allocator: Allocator, method: Follower, parts: list[Part], fit: Fit) -> dict[str, float]:
    """Look at the dense model for the allocator, and keep what it gives every part."""
    known = run.ranks.on_main(run.keeper.allocated)
    if known is not None:
        return known
    aside = run.keeper.aside("allocation")
    if isinstance(allocator, Trying) and run.ranks.size > 1:
        raise UsageError(f"allocator {allocator.name} tries whole models out in one process: leave torchrun out")
    if allocator.measures:
        measuring = Measuring(allocator, method)
        how = (run.dtype, run.batch_tokens, run.progress, aside, run.hidden.elsewhere(aside.hidden))
        _measure(measuring, Run(measuring, run.source, run.tokens, *how, run.allocator_statistics, run.ranks))

    def choose() -> dict[str, float]:
        if isinstance(allocator, Trying):
            found = fit([], _searched(run, allocator, method, parts, aside))
        else:
            layers = range(run.layers if allocator.measures else 0)
            found = fit([aside.ranked(f"block.{layer}") for layer in layers], None)
        run.keeper.allocate(found)
        return found

    return run.ranks.on_main(choose)


def _searched(run: Run, search: Trying, method: Follower, parts: list[Part], aside: Keeper) -> Wishes:
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
            assert isinstance(method, WeightMethod)
            made = allocator.prune_levels(block, method, _parts(run))
            ranked = dict(chain(*(level_tensors(*m).items() for m in zip(modules, made, strict=True))))
        else:
            ranked = {f"block.{layer}": allocator.measure(block, method)}
        run.keeper.keep(layer, Decision(), final=False, walk=run.walk, ranked=ranked)
        del block
