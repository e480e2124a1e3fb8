"""Heads and neurons: all blocks are scored, the budget is spread over them, and what stays makes up for what leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor, nn

from secateur.allocate import Allocator, UniformAllocator
from secateur.allocate.units import Limits, layer_part
from secateur.engine.allocation import shared
from secateur.engine.budgets import (
    Budgets,
    measure_variants,
    read_losses,
    variants_file,
    variants_of,
    windows_for,
    write_losses,
)
from secateur.engine.hidden import frozen_channels
from secateur.engine.keeping import Decision, SeenByModule
from secateur.engine.refits import few_tokens_noted, refit_groups, target_noted
from secateur.engine.run import Run
from secateur.errors import UnsupportedModelError
from secateur.healing import BiasHealer, find
from secateur.methods import Seen, StructuredMethod, UnitMethod
from secateur.models.decoders import family_of, unknown_family
from secateur.models.sources import check_finite
from secateur.observe import Moments
from secateur.structure import HIDDEN, Anatomy, Group
from secateur.structure.surgery import complement

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_NAMES = {"neuron": "FFN neurons", "head": "heads", "kv_head": "heads"}


def check_units(method: StructuredMethod, model: PreTrainedModel, anatomy: Anatomy) -> None:
    """Raises UnsupportedModelError."""
    if not anatomy.of_kind(*method.kinds):
        raise UnsupportedModelError(
            frozen_channels(model, anatomy) if HIDDEN in method.kinds else _nothing_left(method, model, anatomy)
        )


def _nothing_left(method: StructuredMethod, model: PreTrainedModel, anatomy: Anatomy) -> str:
    """Why none of the units that a method removes can leave."""
    if family_of(model) is None:
        return unknown_family(model)
    removed = " and ".join(dict.fromkeys(_NAMES.get(kind, kind) for kind in method.kinds))
    for group in anatomy:
        if group.kind in method.kinds:
            return f"the {removed} of {type(model).__name__} must stay: {group.frozen}"
    return f"{method.name} removes {removed}, and this {type(model).__name__} has none left"


Scoring = Callable[[list[Group], SeenByModule], dict[str, Tensor]]
"""(groups of one block, what was seen of their readers) → score of every unit by group"""


def decide_units(method: UnitMethod, run: Run, scoring: Callable[[], Scoring] | None = None) -> None:
    """Kept units, and what compensates or refits. Raises BudgetError.

    ``scoring`` gives what scores the groups, once a budget is known to be possible; by default the method does, by the
    weight that reads them.
    """
    groups = run.anatomy.of_kind(*method.kinds)
    if method.idle:
        return
    total = method.counted(run.anatomy)
    # refused before anything is observed
    budgets = _budgets(run, method, groups) if method.programmed else None
    allocator, shares = method.allocator(), {}
    if isinstance(allocator, UniformAllocator) and (shares := shared(run, method, groups, total, limits_of(method))):
        allocator = replace(allocator, shares=shares)
    scored = scoring() if scoring is not None else partial(score_units, run, method)
    for layer in run.blocks("calibrate" if run.observed else "score"):
        members = [g for g in groups if g.layer == layer]
        readers = [g.reader for g in members if g.reader]
        block, seen = run.observe(layer, readers, advance=not method.in_sequence)
        part = Decision(scores=scored(members, seen), notes=[*target_noted(layer, run)])
        # a block without any units is one that has lost both of its sub-layers
        if method.in_sequence and members:
            own, whole = layer_part(groups, layer, limits_of(method))
            _allocate(method, allocator, members, part.scores, total * own // whole, part)
            _revise(run, method, members, seen, part)
            _compensate(run, method, members, seen, part)
            if method.refits:
                part.notes += few_tokens_noted(layer, seen, method)
                refit_groups(run, members, seen, part, part)
            if layer == groups[0].layer and not shares:
                part.notes += _untouched_noted(groups, part.keep)
            if block is not None:
                run.silence(block, members, part)
        run.advance(method, block, layer)
        run.keeper.keep(layer, part, final=method.in_sequence, walk=run.walk, seen=None if method.in_sequence else seen)
        del block, seen
    if not method.in_sequence:
        whole = Decision(scores=scored([g for g in groups if g.layer < 0], {}))
        run.keeper.close(_allocate_all(run, method, allocator, groups, total, budgets, whole))


def _allocate_all(
    run: Run,
    method: UnitMethod,
    allocator: Allocator,
    groups: list[Group],
    total: int,
    budgets: Budgets | None,
    part: Decision,
) -> Iterator[Decision]:
    """``part`` has the scores of groups that lie in no single block."""
    scores = {**run.keeper.scores(), **part.scores}
    if budgets is None:
        _allocate(method, allocator, groups, scores, total, part)
    else:
        _meet(run, budgets, method, groups, scores, part)
    part.notes += _untouched_noted(groups, part.keep)
    revises = type(method).revise is not UnitMethod.revise
    # of what a method has no use for, nothing is read
    for layer in range(run.layers) if method.compensates or revises else ():
        members, seen = [g for g in groups if g.layer == layer], run.keeper.seen(layer)
        _revise(run, method, members, seen, part)
        _compensate(run, method, members, seen, part)
    yield part


def _untouched_noted(groups: list[Group], kept: Mapping[str, Tensor]) -> list[str]:
    """That kinds of units give nothing while others do, as an even budget of few heads comes to.

    A budget that is the same in every block is told of by what the first keeps.
    """
    gone: dict[str, int] = {}
    for group in groups:
        if group.name in kept:
            kind = _NAMES.get(group.kind, group.kind)
            gone[kind] = gone.get(kind, 0) + group.units - len(kept[group.name])
    staying, giving = ([kind for kind, count in gone.items() if bool(count) is gives] for gives in (False, True))
    if not staying or not giving:
        return []
    return [f"no {' or '.join(staying)} leave: the whole budget comes out of {' and '.join(giving)}"]


def score_units(
    run: Run,
    method: UnitMethod,
    groups: list[Group],
    seen: SeenByModule,
    more: Callable[[Group], Seen] = lambda group: {},
) -> dict[str, Tensor]:
    """The method's scores of groups, by the weights that read them; ``more`` is what it sees of a group beside data."""
    found = {}
    for group in groups:
        scores = method.score(run.group_target(group), {**seen.get(group.reader or "", {}), **more(group)})
        check_finite(scores, group.name, group.layer, "scores")
        found[group.name] = scores.float().cpu()
    return found


def _allocate(
    method: UnitMethod,
    allocator: Allocator,
    groups: list[Group],
    scores: Mapping[str, Tensor],
    total: int,
    part: Decision,
) -> None:
    kept = allocator.allocate({g.name: scores[g.name] for g in groups}, groups, total, limits_of(method))
    _keep(groups, kept, part)


def _keep(groups: list[Group], kept: Mapping[str, Tensor], part: Decision) -> None:
    for group in groups:
        part.groups[group.name] = group.units
        part.keep[group.name] = kept[group.name]


def _revise(run: Run, method: UnitMethod, groups: list[Group], seen: SeenByModule, part: Decision) -> None:
    """Let the method have another look at which units leave, now that their number is known."""
    if type(method).revise is UnitMethod.revise:
        return
    for group in groups:
        gone = complement(part.keep[group.name], group.units)
        # a swap between parts that must lose the same number each would unbalance them
        if len(gone) and group.balance == 1:
            gone = method.revise(run.group_target(group), seen.get(group.reader or "", {}), gone)
            part.keep[group.name] = complement(gone.cpu(), group.units)


def _budgets(run: Run, method: UnitMethod, groups: list[Group]) -> Budgets:
    def found() -> Budgets:
        budgets = Budgets.of(method, run.anatomy, run.source, run.latency_table, run.progress)
        budgets.check(groups, limits_of(method))
        return budgets

    return run.ranks.on_main(found)


def _meet(
    run: Run, budgets: Budgets, method: UnitMethod, groups: list[Group], scores: Mapping[str, Tensor], part: Decision
) -> None:
    """Decide by an integer programme over all groups."""
    losses = _variant_losses(run, method, groups, scores) if method.variants == "measured" else None
    allocator = budgets.allocator(scores, losses)
    kept = allocator.allocate({g.name: scores[g.name] for g in groups}, groups, 0, limits_of(method))
    _keep(groups, kept, part)
    part.budgets = budgets.account(kept, groups)
    part.notes += budgets.notes


def _variant_losses(
    run: Run, method: UnitMethod, groups: list[Group], scores: Mapping[str, Tensor]
) -> dict[str, dict[int, float]]:
    tokens, dtype = run.tokens, run.dtype
    assert tokens is not None
    ids = windows_for(tokens.ids, method.variant_tokens)
    variants = {g.name: variants_of(g, scores[g.name], limits_of(method)) for g in groups}
    # what is asked of a method changes which variants there are, and not what they lose
    own = {name: value for name, value in method.options().items() if name not in UnitMethod.asking}
    path = variants_file(run.statistics, ids, variants, [method.name, own, str(dtype)])
    losses = read_losses(path)
    if losses is None:
        losses = measure_variants(
            run.source, ids, variants, groups, partial(_cut_to, run, method), dtype=dtype, progress=run.progress
        )
        if path is not None:
            write_losses(path, losses)
    return losses


def _cut_to(run: Run, method: UnitMethod, block: nn.Module, group: Group, units: Tensor) -> None:
    """Leave these units of a group in the working copy of its block, and make up for the others."""
    part = Decision(groups={group.name: group.units}, keep={group.name: units})
    if method.compensates:
        _compensate(run, method, [group], run.keeper.seen(group.layer), part)
    run.silence(block, [group], part)


def _compensate(run: Run, method: UnitMethod, groups: list[Group], seen: SeenByModule, part: Decision) -> None:
    for group in groups:
        gone = complement(part.keep[group.name], group.units)
        if not len(gone):
            continue
        target, mine = run.group_target(group), seen.get(group.reader or "", {})
        bias = method.compensate(target, mine, gone)
        if bias is None and method.heal == "bias":
            columns = group.columns[gone].flatten()
            bias = BiasHealer().heal(target.weight, find(mine, Moments).mean_C, columns)
        if bias is not None:
            check_finite(bias, group.name, group.layer, "bias compensation")
            part.biases[f"{group.reader}.bias"] = bias.float().cpu()


def limits_of(method: StructuredMethod) -> Limits:
    return Limits(budget=method.budget, min_keep=method.min_keep, round_to=method.round_to)
