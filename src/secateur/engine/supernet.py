"""Heads and neurons, by a search on the whole model over levels to which every group was cut beforehand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor, nn

from secateur.allocate import Grid, even_start
from secateur.allocate.units import Limits
from secateur.engine.keeping import Decision, Keeper, SeenByModule
from secateur.engine.run import Run, set_weight
from secateur.engine.searching import LevelTrials, level_tensors, level_weight
from secateur.errors import UsageError
from secateur.methods import SupernetMethod
from secateur.search import Levels
from secateur.structure import Group
from secateur.structure.surgery import complement

_SEARCHED, _NOTES = "search", "notes of block"


def decide_supernet(method: SupernetMethod, run: Run) -> None:
    """Kept units, and what the weights become that read them.

    What each search has found is noted; the levels of all groups are kept aside until the next search has its own.
    Raises UsageError, DataError, BudgetError.
    """
    groups = run.anatomy.of_kind(*method.kinds)
    if method.idle:
        return
    if run.ranks.size > 1:
        raise UsageError(f"{method.name} searches on the whole model, in one process: start it without torchrun")
    tokens = run.tokens
    assert tokens is not None
    # refused before anything is observed
    searches = method.searches(tokens.ids.numel())
    limits = Limits(budget=method.budget, min_keep=method.min_keep, round_to=method.round_to)
    centre = even_start(groups, method.sparsity, limits.cost(run.anatomy.blocks), limits)
    searched = run.keeper.noted(_SEARCHED)
    for iteration in range(searches):
        half, step = method.levels // 2, method.step / 2**iteration
        grid = Grid.of(groups, centre, limits, step=step, half=half)
        if iteration in searched and iteration + 1 < searches:
            centre = grid.at(searched[iteration]).centre
            continue
        aside = run.keeper.aside(f"supernet-{iteration}")
        _cut_to_levels(method, run, groups, grid, aside)
        found = _search(method, run, groups, grid, aside, iteration)
        if iteration + 1 == searches:
            log = _log([*(levels for _, levels in sorted(run.keeper.noted(_SEARCHED).items())), found])
            run.keeper.close(chain([Decision(notes=log)], _decided(run, groups, grid, found, aside)))
        else:
            centre = grid.at(found).centre
            run.keeper.note(_SEARCHED, iteration, list(found))
            run.keeper.discard(f"supernet-{iteration}")


def _cut_to_levels(method: SupernetMethod, run: Run, groups: list[Group], grid: Grid, aside: Keeper) -> None:
    """Every group at every level, kept aside; later blocks see what the method says of those before."""
    statistics = None if method.in_sequence else run.statistics
    how = (run.dtype, run.batch_tokens, run.progress, aside, run.hidden.elsewhere(aside.hidden))
    mine = Run(method, run.source, run.tokens, *how, statistics, run.ranks)
    ranges = grid.ranges()
    for layer in mine.blocks("levels"):
        places = [i for i, group in enumerate(groups) if group.layer == layer]
        readers = [groups[i].reader or "" for i in places]
        block, seen = mine.observe(layer, readers, advance=not method.in_sequence)
        ranked: dict[str, Tensor] = {}
        notes: list[str] = []
        for i in places:
            removed = [grid.removed(i, level) for level in ranges[i]]
            kept, more = _cut_group(method, mine, groups[i], removed, seen)
            notes += more
            ranked |= level_tensors(groups[i].reader or "", dict(zip(ranges[i], kept, strict=True)))
            if block is not None and method.in_sequence:
                _accumulate(method, mine, block, groups[i], removed, kept, ranges[i].index(0))
        if notes:
            aside.note(_NOTES, layer, notes)
        mine.advance(method, block, layer)
        aside.keep(layer, Decision(), final=False, walk=mine.walk, ranked=ranked)
        del block, seen, ranked


def _cut_group(
    method: SupernetMethod, run: Run, group: Group, removed: list[int], seen: SeenByModule
) -> tuple[list[tuple[Tensor, Tensor | None]], tuple[str, ...]]:
    """Mask and new weight of the reader, [outputs, inputs], when it loses each of these numbers; notes."""
    target = run.group_target(group)
    made, notes = method.levels_of(target, seen.get(group.reader or "", {}), removed, group.balance)
    kept: list[tuple[Tensor, Tensor | None]] = []
    for gone_U, weight in made:
        keep_I = torch.ones(target.weight.shape[1], dtype=torch.bool, device=target.weight.device)
        keep_I[group.columns.to(keep_I.device)[gone_U].flatten()] = False
        kept.append((keep_I.expand(target.weight.shape), weight))
    return kept, notes


def _accumulate(
    method: SupernetMethod,
    run: Run,
    block: nn.Module,
    group: Group,
    removed: list[int],
    kept: list[tuple[Tensor, Tensor | None]],
    centre: int,
) -> None:
    """Let the working copy of a block give what the levels of a group give on average, or the one in the middle.

    The outputs of a weight are linear in it, so that the mean weight gives the mean output.
    """
    reader = group.reader or ""
    dense = run.group_target(group).weight
    weights = [dense * keep if weight is None else weight for keep, weight in kept]
    shares = expectation_weights([count / group.units for count in removed])
    if method.accumulation == "centre":
        shares = [float(place == centre) for place in range(len(removed))]
    mean = sum((share * weight for share, weight in zip(shares, weights, strict=True)), torch.zeros_like(dense))
    set_weight(block, run.inside(reader), mean, not run.is_linear(reader))


def expectation_weights(sparsities: list[float]) -> list[float]:
    """(1 - S_e) / sum over all levels of (1 - S_e'): how much every level has of the mean (eq. 5 of the paper)."""
    kept = [1 - sparsity for sparsity in sparsities]
    return [one / sum(kept) for one in kept]


def _search(method: SupernetMethod, run: Run, groups: list[Group], grid: Grid, aside: Keeper, iteration: int) -> Levels:
    tokens = run.tokens
    assert tokens is not None
    # other draws in every search
    seed = method.seed * method.iterations + iteration
    evolution = replace(method.evolution(tokens.ids.numel()), seed=seed)
    alike = (0,) * len(groups)
    if not evolution.generations:
        return alike
    by_module = {m.module: m for m in run.anatomy.matrices}
    trials = LevelTrials(
        run.source,
        [by_module[group.reader or ""] for group in groups],
        tokens.ids,
        aside,
        dtype=run.dtype,
        generations=evolution.generations,
        progress=run.progress,
        fitness=method.measured_by(),
        groups=groups,
    )
    limits = Limits(budget=method.budget)

    def size(place: int, level: int) -> int:
        # the first level of a width that isn't a multiple takes less, and groups may differ
        return grid.removed(place, level) * limits.cost(groups[place].cost)

    return evolution.run(alike, grid.ranges(), trials, grid.kinds, size)


def _log(searches: list[Levels]) -> list[str]:
    """What a plan says of the searches."""
    moved = [sum(level != 0 for level in levels) for levels in searches]
    return [
        f"search {number}: {count} of {len(searches[0])} groups left the level in the middle"
        for number, count in enumerate(moved, start=1)
        if count
    ]


def _decided(run: Run, groups: list[Group], grid: Grid, levels: Levels, aside: Keeper) -> Iterator[Decision]:
    """The groups at the levels that were found, block by block."""
    notes = aside.noted(_NOTES)
    for layer in range(run.layers):
        part = Decision(notes=list(notes.get(layer, ())))
        for i, group in enumerate(groups):
            if group.layer != layer:
                continue
            reader, removed = group.reader or "", grid.removed(i, levels[i])
            dense = run.group_target(group).weight
            keep_OI, weight_OI = level_weight(aside, reader, levels[i], dense)
            columns = group.columns.to(keep_OI.device)[:, 0]
            kept = keep_OI[0, columns].nonzero().flatten().cpu()
            assert len(kept) == group.units - removed
            part.groups[group.name], part.keep[group.name] = group.units, kept
            # without a refit, what stays is as it was, and the cut says all
            if len(complement(kept, group.units)) and not torch.equal(weight_OI, dense * keep_OI):
                run.put(part, reader, weight_OI, keep_OI, not run.is_linear(reader), layer)
        yield part
