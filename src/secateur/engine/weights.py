"""Single weights: every matrix of a block is decided when its inputs have been seen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from secateur.allocate import lowest_of_all, parse_pattern, part_of
from secateur.engine.allocation import allocated
from secateur.engine.keeping import Decision
from secateur.engine.refits import few_tokens_noted, target_noted
from secateur.engine.run import Run, set_weight
from secateur.errors import UnsupportedModelError, UsageError
from secateur.methods import SearchMethod, WeightMethod
from secateur.models.decoders import matrix_roles
from secateur.structure import Anatomy, Matrix

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# by what they are for; see ``matrix_roles``
_TOGETHER = (("q", "k", "v", "qkv"), ("o",), ("gate", "up", "gate_up"), ("down",))
_LAST_OF_ATTENTION = "o"


def check_weights(method: WeightMethod | SearchMethod, model: PreTrainedModel, anatomy: Anatomy) -> None:
    """Raises UsageError, UnsupportedModelError."""
    if not anatomy.matrices:
        raise UnsupportedModelError(f"{type(model).__name__} has no linear weights in its blocks")
    if pattern := getattr(method, "pattern", ""):
        _check_pattern(pattern, anatomy.matrices)


def decide_weights(method: WeightMethod, run: Run) -> None:
    """Masks, and new values where the method or a refit solves for some."""
    targets = list(run.anatomy.matrices)
    if method.sparsity == 0 and not method.pattern:
        return
    if method.decides_globally:
        _decide_globally(run, method, targets)
        return
    own = allocated(run, method)
    roles = _known_roles(run, targets) if method.true_sequential else {}
    for layer in run.blocks("prune"):
        part, block, seen = Decision(), None, {}
        part.notes += target_noted(layer, run)
        if layer == 0 and method.true_sequential and not roles:
            part.notes.append(
                "true_sequential: which matrices of a block come first is unknown, so all were decided at once"
            )
        for members in _stages([m for m in targets if m.layer == layer], roles):
            block, seen = run.observe(layer, [m.module for m in members], advance=not method.in_sequence, begun=block)
            for matrix in members:
                weight = _prune_matrix(run, own.get(matrix.module, method), matrix, seen.get(matrix.module, {}), part)
                if block is not None and method.in_sequence:
                    set_weight(block, run.inside(matrix.module), weight, matrix.transposed)
            if block is not None and any(roles.get(m.module) == _LAST_OF_ATTENTION for m in members):
                run.settle_attention(block, layer)
        if method.refits and not method.refits_later:
            part.notes += few_tokens_noted(layer, seen, method)
        run.advance(method, block, layer)
        run.keeper.keep(layer, part, final=True, walk=run.walk)
        # so that the next block and its statistics don't meet these in memory
        del block, seen


def _known_roles(run: Run, targets: list[Matrix]) -> Mapping[str, str]:
    """What every matrix is for; nothing where that isn't known of all of them."""
    roles = matrix_roles(run.source.model)
    return roles if all(matrix.module in roles for matrix in targets) else {}


def _stages(members: list[Matrix], roles: Mapping[str, str]) -> list[list[Matrix]]:
    """Matrices of a block that are decided together: those that read the same, in the order of the forward.

    All of them without ``roles``. There is one stage at least, as text goes through a block that has no matrices, too.
    """
    stages = [[m for m in members if roles[m.module] in together] for together in _TOGETHER] if roles else []
    return [stage for stage in stages if stage] or [members]


def _prune_matrix(run: Run, method: WeightMethod, matrix: Matrix, seen: Mapping[str, Any], part: Decision) -> Tensor:
    """Decide one matrix; returns its pruned weight [outputs, inputs]."""
    target = run.target(matrix.module, "weight", matrix.layer, name=matrix.module)
    keep, weight, notes = method.prune(target, seen)
    part.notes += notes
    if method.refits and not method.refits_later:
        weight, notes = run.repair.weights(target.name, target.weight, keep, seen, weight)
        part.notes += notes
    if weight is None:
        part.masks[matrix.tensor] = (keep.T.contiguous() if matrix.transposed else keep).cpu()
        return target.weight * keep
    run.put(part, matrix.module, weight, keep, matrix.transposed, matrix.layer)
    return weight


def _decide_globally(run: Run, method: WeightMethod, targets: list[Matrix]) -> None:
    """One threshold over all matrices, from statistics of the dense model."""
    for layer in run.blocks("score"):
        members = [m for m in targets if m.layer == layer]
        _, seen = run.observe(layer, [m.module for m in members], advance=True)
        ranked = {}
        for matrix in members:
            target = run.target(matrix.module, "weight", layer, name=matrix.module)
            ranked[matrix.module] = method.score(target, seen.get(matrix.module, {})).float().cpu()
        part = Decision(notes=[*target_noted(layer, run)])
        run.keeper.keep(layer, part, final=False, walk=run.walk, ranked=ranked)
    count = part_of(sum(m.shape[0] * m.shape[1] for m in targets), method.sparsity)
    gone = lowest_of_all(lambda: (run.keeper.ranked(m.module) for m in targets), count)

    def parts() -> Iterator[Decision]:
        for matrix, leave in zip(targets, gone, strict=True):
            yield Decision(masks={matrix.tensor: (~leave).T.contiguous() if matrix.transposed else ~leave})

    run.keeper.close(parts())


def _check_pattern(pattern: str, matrices: Sequence[Matrix]) -> None:
    rule = parse_pattern(pattern)
    for matrix in matrices:
        if matrix.shape[1] % rule.m:
            raise UsageError(
                f"pattern {pattern} needs a multiple of {rule.m} inputs, {matrix.module} has {matrix.shape[1]}"
            )
