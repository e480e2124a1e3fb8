"""Attentions and MLPs: those leave without which the whole model does best, as a method searches them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from secateur.engine.keeping import Decision
from secateur.engine.run import Run
from secateur.engine.trials import SublayerTrials
from secateur.errors import BudgetError, UnsupportedModelError, UsageError
from secateur.methods import Gone, Sublayer, SublayerMethod
from secateur.models.decoders import decoder_blocks, turned_blocks, unknown_family
from secateur.models.surgery import sublayer_kind
from secateur.structure import Anatomy, Group

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_sublayers(method: SublayerMethod, model: PreTrainedModel, anatomy: Anatomy) -> None:
    """Raises UnsupportedModelError."""
    if turned := turned_blocks(decoder_blocks(model)[1]):
        raise UnsupportedModelError(f"sub-layers of {type(model).__name__} must stay: {turned}")
    if not _sublayers(anatomy):
        raise UnsupportedModelError(unknown_family(model))


def _sublayers(anatomy: Anatomy) -> list[Group]:
    return [group for group in anatomy if group.reader]


def decide_sublayers(method: SublayerMethod, run: Run) -> None:
    """The sub-layers that stay. Raises UsageError, BudgetError."""
    groups = _sublayers(run.anatomy)
    if run.ranks.size > 1:
        raise UsageError(f"{method.name} tries whole models out in one process: start it without torchrun")
    sublayers = [Sublayer(g.name, sublayer_kind(g), g.layer, g.units * g.cost.macs) for g in groups]
    for _ in run.blocks("check"):
        pass
    gone, notes = method.search(sublayers, SublayerTrials(run, method.hidden_bytes))
    if len(gone) == len(groups):
        raise BudgetError("can't remove all sub-layers: at least one must stay")
    if gone or notes:
        run.keeper.close(iter([_decision(run, groups, gone, notes)]))


def _decision(run: Run, groups: list[Group], gone: Gone, notes: tuple[str, ...]) -> Decision:
    """A block with nothing left leaves as a whole, where blocks may."""
    blocks, part = run.anatomy["layers"], Decision(notes=list(notes))
    left = {g.layer for g in groups if g.name not in gone}
    whole = set() if blocks.frozen else set(range(blocks.units)) - left
    if whole:
        stay = torch.tensor(sorted(set(range(blocks.units)) - whole), dtype=torch.int64)
        part.groups["layers"], part.keep["layers"] = blocks.units, stay
    for group in groups:
        if group.name in gone and group.layer not in whole:
            part.groups[group.name], part.keep[group.name] = group.units, torch.empty(0, dtype=torch.int64)
    return part
