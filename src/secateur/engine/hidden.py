"""Hidden channels: those leave that all attentions and MLPs together can do without."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from secateur.allocate import best_channels, kept_channels
from secateur.engine.keeping import Decision
from secateur.engine.run import Run
from secateur.errors import UnsupportedModelError
from secateur.methods import HiddenMethod, Target
from secateur.models.decoders import DecoderBlock, typed_blocks, unknown_family
from secateur.models.sources import check_finite
from secateur.structure import HIDDEN, Anatomy

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_hidden(method: HiddenMethod, model: PreTrainedModel, anatomy: Anatomy) -> None:
    """Raises UnsupportedModelError, BudgetError."""
    if not anatomy.of_kind(HIDDEN):
        raise UnsupportedModelError(frozen_channels(model, anatomy))
    if not any(readers_of(block) for block in typed_blocks(model)):
        raise UnsupportedModelError(f"no attention and no MLP of this {type(model).__name__} is left to score by")
    kept_channels(anatomy[HIDDEN], method.sparsity, method.round_to)


def frozen_channels(model: PreTrainedModel, anatomy: Anatomy) -> str:
    """The sentence for a model whose hidden channels must stay."""
    groups = [group for group in anatomy.groups if group.kind == HIDDEN]
    if not groups:
        return unknown_family(model)
    return f"the hidden channels of {type(model).__name__} must stay: {groups[0].frozen}"


def decide_hidden(method: HiddenMethod, run: Run) -> None:
    """The channels that stay."""
    group, model = run.anatomy[HIDDEN], run.source.model
    kept = kept_channels(group, method.sparsity, method.round_to)
    if kept == group.units:
        return
    scores = torch.zeros(group.units, dtype=torch.float64)
    blocks = typed_blocks(model)
    for layer in run.blocks("calibrate"):
        readers = readers_of(blocks[layer])
        _, seen = run.observe(layer, readers, advance=True)
        ranked = {name: method.score(_target(name, layer), seen[name]).double().cpu() for name in readers}
        run.keeper.keep(layer, Decision(), final=False, walk=run.walk, ranked=ranked)
    for block in blocks:
        for name in readers_of(block):
            found = run.keeper.ranked(name)
            check_finite(found, name, block.layer, "scores")
            scores += found
    best = best_channels(scores, kept)
    run.keeper.close(iter([Decision({HIDDEN: group.units}, {HIDDEN: best}, scores={HIDDEN: scores.float()})]))


def readers_of(block: DecoderBlock) -> list[str]:
    """One linear layer for each norm that reads the residual stream."""
    family = block.family
    return [
        *([block.path(family.attention, family.qkv[0])] if block.has_attention else []),
        *([block.path(family.mlp, family.up[0])] if block.has_mlp else []),
    ]


def _target(name: str, layer: int) -> Target:
    return Target(name, HIDDEN, layer, torch.empty(0, 0))
