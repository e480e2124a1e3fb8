"""Heads and neurons by all slices that leave with them, and by the gradient that comes back through the blocks."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from secateur.allocate.units import Kept, Limits
from secateur.engine.keeping import Decision, SeenByModule
from secateur.engine.run import Run, lost_states
from secateur.engine.units import Scoring, decide_units, limits_of
from secateur.errors import DataError
from secateur.methods import Coupled, CoupledMethod, Part
from secateur.models.sources import check_finite
from secateur.observe.backward import BackwardWalk, Slopes
from secateur.structure import HIDDEN, Group, Slices
from secateur.tensorfiles import read_header, write_tensors


def decide_coupled(method: CoupledMethod, run: Run) -> None:
    """Kept units, and what compensates or refits. Raises BudgetError, DataError."""
    decide_units(method, run, partial(_scoring, method, run))


def _scoring(method: CoupledMethod, run: Run) -> Scoring:
    groups = run.anatomy.of_kind(*method.kinds)
    # hidden channels, which lie in no block, are scored when all blocks have been walked over
    if not method.needs or (run.keeper.finished == run.layers and HIDDEN not in method.kinds):
        return partial(_score, method, run, {})
    known = _scores_after_rounds(method, run, groups)

    def scored(members: list[Group], seen: SeenByModule) -> dict[str, Tensor]:
        return {group.name: known[group.name] for group in members}

    return scored


def _scores_after_rounds(method: CoupledMethod, run: Run, groups: list[Group]) -> Mapping[str, Tensor]:
    """Scores of all groups; what an earlier round has removed scores lowest, so that it stays removed."""
    tokens = run.tokens
    assert tokens is not None
    if len(tokens.ids) < method.rounds * run.ranks.size:
        raise DataError(
            f"{method.name}: {method.rounds} rounds need a calibration window each, of every rank, and there are"
            f" {len(tokens.ids)}: add samples"
        )
    stored = _stored(method, run)
    if stored is not None and run.ranks.on_main(stored.is_file):
        return {name: tensor.read() for name, tensor in read_header(stored).items()}
    windows = tokens.ids.tensor_split(method.rounds)
    total = Limits(budget=method.budget).cost(run.anatomy.blocks)
    kept: Kept = {}
    scores: Mapping[str, Tensor] = {}
    for number in range(method.rounds):
        scores = {**_descended(method, run, groups, kept, windows[number], number)}
        for name, units in kept.items():
            gone = torch.ones(len(scores[name]), dtype=torch.bool)
            gone[units] = False
            scores[name] = scores[name].masked_fill(gone, float(scores[name].min()) - 1)
        if number + 1 < method.rounds:
            allocator = method.partway((number + 1) / method.rounds).allocator()
            kept = allocator.allocate(scores, groups, total, limits_of(method))
    if stored is not None and run.ranks.main:
        stored.parent.mkdir(parents=True, exist_ok=True)
        temporary = stored.with_suffix(f".{os.getpid()}.part")
        write_tensors(temporary, scores, durable=True)
        os.replace(temporary, stored)
    return scores


def _stored(method: CoupledMethod, run: Run) -> Path | None:
    """The file of the scores of the dense model, which are the same however much is asked for."""
    if run.statistics is None or not method.kept_scores:
        return None
    return run.statistics / f"scores-{method.kept_scores}.safetensors"


def _descended(
    method: CoupledMethod, run: Run, groups: list[Group], kept: Kept, ids: Tensor, number: int
) -> Mapping[str, Tensor]:
    """Scores of all groups of the model that has the ``kept`` units left, by one walk up and back."""
    aside = run.keeper.aside(f"round-{number}")
    scores = dict(aside.scores())
    wide = [g for g in groups if g.kind == HIDDEN]
    if aside.finished == run.layers:
        return _combined(method, wide, scores)
    walk = BackwardWalk(
        run.source,
        run.ranks.part(ids),
        dtype=run.dtype,
        batch_tokens=run.batch_tokens,
        hidden=run.hidden.elsewhere(aside.hidden),
        change=partial(_without, run, groups, kept),
        single="diagonal" in method.needs,
    )
    if not aside.resume(walk):
        raise lost_states()
    for done in range(aside.finished, run.layers):
        layer = run.layers - 1 - done
        members = [g for g in groups if g.layer == layer]
        prefix = f"{run.source.name}.{layer}."
        entries = [piece for g in wide for piece in g.slices if piece.tensor.startswith(prefix)]
        names = dict.fromkeys(piece.tensor for piece in [*(p for g in members for p in g.pieces), *entries])
        block = walk.open_changed(layer)
        found = walk.descend(block, layer, [run.inside(name) for name in names])
        slopes = {name: slope for name, slope in zip(names, found.values(), strict=True)}
        # in float32 as the other scores: the working copy may be coarser
        run.ranks.merge({"": slopes})
        rows = _rows(method, run, layer, entries, slopes)
        if layer == 0 and wide:
            # with the last block, since nothing is kept to go on from behind it
            outer = [piece for g in wide for piece in g.slices if not piece.tensor.startswith(f"{run.source.name}.")]
            around = dict(walk.outside([piece.tensor for piece in outer]))
            run.ranks.merge({"": around})
            rows |= _rows(method, run, layer, outer, around)
        part = Decision(scores={**_score(method, run, slopes, members, {}), **rows})
        # every rank knows them, and one writes
        scores |= part.scores
        aside.keep(done, part, final=False, walk=walk)
        run.progress("gradients", done + 1, run.layers)
        del block, found, slopes
    return _combined(method, wide, scores)


def _combined(method: CoupledMethod, wide: list[Group], scores: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The rows of all slices of hidden channels put together; other scores as they are."""
    return {group.name: _together(method, group, scores) for group in wide} or scores


def _without(run: Run, groups: list[Group], kept: Kept, block: nn.Module, layer: int) -> None:
    """Leave only the kept units of a block; all where nothing has left."""
    members = [g for g in groups if g.layer == layer and g.name in kept]
    run.silence(block, members, Decision(keep={g.name: kept[g.name] for g in members}))


def _score(
    method: CoupledMethod, run: Run, slopes: Mapping[str, Slopes], groups: list[Group], seen: SeenByModule
) -> dict[str, Tensor]:
    found = {}
    for group in groups:
        if group.kind == HIDDEN:
            found[group.name] = _together(method, group, _rows(method, run, 0, group.slices, slopes))
            continue
        parts = tuple(_part(method, run, group.layer, piece, slopes) for piece in group.pieces)
        scores = method.score_coupled(Coupled(group.name, group.units, parts))
        check_finite(scores, group.name, group.layer, "scores")
        found[group.name] = scores.float().cpu()
    return found


def _rows(
    method: CoupledMethod, run: Run, layer: int, pieces: Sequence[Slices], slopes: Mapping[str, Slopes]
) -> dict[str, Tensor]:
    """What hidden channels score by each of these slices, by tensor, biases left out."""
    parts = (_part(method, run, layer, piece, slopes) for piece in pieces)
    return {part.tensor: method.rows(part).cpu() for part in parts if part.role != "bias"}


def _together(method: CoupledMethod, group: Group, rows: Mapping[str, Tensor]) -> Tensor:
    scores = method.together([rows[piece.tensor] for piece in group.slices if piece.tensor in rows])
    check_finite(scores, group.name, 0, "scores")
    return scores.float()


def _part(method: CoupledMethod, run: Run, layer: int, piece: Slices, slopes: Mapping[str, Slopes]) -> Part:
    """One projection as a method sees it, in float32 and as it is stored."""
    weight = run.source.tensor(piece.tensor).to(run.source.device_of(layer))
    weight = weight if weight.dtype == torch.float64 else weight.float()
    role = "weight" if weight.dim() > 1 else "bias" if piece.tensor.endswith(".bias") else "scale"
    part = Part(piece.tensor, piece.dim, piece.index, role, weight)
    slope = slopes.get(piece.tensor)
    return part if slope is None else replace(part, **{name: getattr(slope, name) for name in method.needs})
