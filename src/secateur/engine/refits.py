"""Least squares for what stays: of a block that is being decided, and of all blocks once everything is decided."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from secateur.allocate import parse_pattern
from secateur.engine.keeping import Decided, Decision, SeenByModule
from secateur.engine.run import Run, set_weight
from secateur.healing import find
from secateur.healing.refit import few_tokens
from secateur.methods import Method, Refittable
from secateur.models.decoders import family_of
from secateur.models.sources import check_finite
from secateur.observe import Gram, of_ending
from secateur.structure import Group, Matrix
from secateur.structure.surgery import complement


def refit(run: Run, method: Refittable) -> None:
    """A walk over the cut blocks, which gives new values to what stays of them."""
    decided = run.keeper.decided()
    run.walk, run.observed, run.hidden = None, method.refit_statistics(), run.hidden.another()
    matrices = [m for m in run.anatomy.matrices if m.tensor in decided.masks]
    groups = [g for g in run.anatomy if g.name in decided.keep and g.reader]
    for layer in run.blocks("refit", run.keeper.refitted):
        part = Decision()
        mine = [m for m in matrices if m.layer == layer]
        members = [g for g in groups if g.layer == layer]
        readers = [m.module for m in mine] or [g.reader for g in members if g.reader]
        block, seen = run.observe(layer, readers, advance=False)
        assert block is not None
        part.notes += few_tokens_noted(layer, seen, method) + target_noted(layer, run)
        for matrix in mine:
            weight = _refit_matrix(run, matrix, decided, seen[matrix.module], part)
            set_weight(block, run.inside(matrix.module), weight, matrix.transposed)
        if members and not mine:
            refit_groups(run, members, seen, decided, part)
            known = Decision(keep=dict(decided.keep), masks=part.masks, values=part.values, biases=part.biases)
            run.silence(block, members, known)
        run.go_on(block, layer)
        run.keeper.refit(layer, part, run.walk)
        del block, seen


def _refit_matrix(run: Run, matrix: Matrix, decided: Decided, seen: Mapping[str, Any], part: Decision) -> Tensor:
    target = run.target(matrix.module, "weight", matrix.layer, name=matrix.module)
    stored = decided.masks[matrix.tensor].to(target.weight.device)
    keep = stored.T if matrix.transposed else stored
    weight, notes = run.repair.weights(target.name, target.weight, keep, seen)
    part.notes += notes
    run.put(part, matrix.module, weight, keep, matrix.transposed, matrix.layer)
    return weight


def refit_groups(run: Run, groups: list[Group], seen: SeenByModule, decided: Decided, part: Decision) -> None:
    """Refit the columns that stay of the weights which read groups, and the biases where there are some."""
    for group in groups:
        gone, reader = complement(decided.keep[group.name], group.units), group.reader or ""
        if not len(gone):
            continue
        target, bias = run.group_target(group), f"{reader}.bias"
        gone_I = torch.zeros(target.weight.shape[1], dtype=torch.bool, device=target.weight.device)
        gone_I[group.columns[gone].flatten().to(gone_I.device)] = True
        weight, added, notes = run.repair.columns(
            group.name, target.weight, gone_I, seen[reader], bias=bias in decided.biases
        )
        part.notes += notes
        run.put(part, reader, weight, ~gone_I.expand(weight.shape), not run.is_linear(reader), group.layer)
        if added is not None:
            check_finite(added, group.name, group.layer, "bias compensation")
            part.biases[bias] = added.float().cpu()


def few_tokens_noted(layer: int, seen: SeenByModule, method: Method) -> tuple[str, ...]:
    """Said once, for the widest input of the first block."""
    grams = [find(statistics, Gram) for statistics in seen.values()] if layer == 0 else []
    widest = max(grams, key=lambda gram: len(gram.dead), default=None)
    pattern = getattr(method, "pattern", "")
    share = parse_pattern(pattern).share if pattern else getattr(method, "sparsity", 0.0)
    return few_tokens(widest.tokens, int(len(widest.dead) * (1 - share))) if widest is not None else ()


def target_noted(layer: int, run: Run) -> tuple[str, ...]:
    """Said once: that a target has no part in this, or ``stream`` none of the module that could make up for losses."""
    method, model = run.method, run.source.model
    if layer or not isinstance(method, Refittable) or method.target == "current":
        return ()
    if not (method.fits or method.refits):
        return (f"target={method.target}: {method.name} fits nothing without heal=refit, so it had no part in this",)
    if not of_ending(run.observed) or family_of(model) is not None:
        return ()
    return (
        f"target=stream: how a block of model type {model.config.model_type} adds what its FFN gives is unknown to"
        " secateur, so target=current was taken",
    )
