"""Whole blocks: those leave whose outputs are most like their inputs, or whatever else a method scores."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from secateur.allocate import part_of
from secateur.engine.keeping import Decision
from secateur.engine.run import Run
from secateur.errors import BudgetError, UnsupportedModelError
from secateur.methods import LayerMethod, Target
from secateur.models.sources import check_finite
from secateur.structure import Anatomy, Group

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_layers(method: LayerMethod, model: PreTrainedModel, anatomy: Anatomy) -> None:
    """Raises UnsupportedModelError, BudgetError."""
    group = anatomy["layers"]
    count = _count(method, group)
    if count and group.frozen:
        raise UnsupportedModelError(f"blocks of {type(model).__name__} must stay: {group.frozen}")
    if count >= group.units:
        raise BudgetError(f"can't remove {count} of {group.units} blocks: at least one must stay")


def decide_layers(method: LayerMethod, run: Run) -> None:
    """The blocks that stay."""
    group = run.anatomy["layers"]
    count = _count(method, group)
    if count == 0:
        if method.sparsity:
            note = f"{method.sparsity:g} of {group.units} blocks is less than one, so none leaves"
            run.keeper.close(iter([Decision(notes=[note])]))
        return
    for layer in run.blocks("calibrate"):
        name = f"layers.{layer}"
        measured = method.measured(Target(name, "layer", layer, torch.empty(0, 0)), run.observe_block(layer))
        run.keeper.keep(layer, Decision(), final=False, walk=run.walk, ranked={name: measured.cpu()})
    run.keeper.close(_drop_lowest(run, method, group, count))


def _count(method: LayerMethod, group: Group) -> int:
    return method.layers or part_of(group.units, method.sparsity)


def _drop_lowest(run: Run, method: LayerMethod, group: Group, count: int) -> Iterator[Decision]:
    ranked = method.scores([run.keeper.ranked(f"layers.{layer}") for layer in range(group.units)], count)
    check_finite(ranked, "layers", 0, "scores")
    yield Decision(
        groups={"layers": group.units},
        keep={"layers": ranked.argsort(stable=True)[count:].sort().values},
        scores={"layers": ranked.float()},
    )
