"""The engine: observe → score → allocate → Plan. It owns the loop over blocks; methods only supply the words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import singledispatchmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from secateur.allocate import PerMatrix, parse_pattern
from secateur.allocate.units import Limits
from secateur.errors import BudgetError, DataError, NonFiniteError, UnsupportedModelError, UsageError
from secateur.methods import LayerMethod, Method, Target, UnitMethod, WeightMethod
from secateur.models.decoders import decoder_anatomy, decoder_blocks, unknown_family
from secateur.observe.driver import BlockWalk
from secateur.structure import Anatomy, Group, Matrix

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from secateur.observe.calibration import Tokens

Progress = Callable[[str, int, int], None]
SeenByModule = Mapping[str, Mapping[str, Any]]


@dataclass
class Decision:
    """The parts of a Plan, while they are being decided."""

    groups: dict[str, int] = field(default_factory=dict)
    keep: dict[str, Tensor] = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    scores: dict[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def decide(
    method: Method,
    model: PreTrainedModel,
    tokens: Tokens | None,
    *,
    dtype: torch.dtype,
    batch_tokens: int,
    progress: Progress,
) -> Decision:
    """What ``method`` removes from ``model``, which is left as it is; ``tokens`` are its calibration windows."""
    return _Run(method, model, tokens, dtype, batch_tokens, progress).decide(method)


class _Run:
    def __init__(
        self,
        method: Method,
        model: PreTrainedModel,
        tokens: Tokens | None,
        dtype: torch.dtype,
        batch_tokens: int,
        progress: Progress,
    ) -> None:
        if method.statistics and tokens is None:
            raise DataError(f"{method.name} needs calibration data: give a tokenizer and a calibration text")
        self.method, self.model, self.progress = method, model, progress
        self.anatomy: Anatomy = decoder_anatomy(model, heads=getattr(method, "heads", "kv"))
        self.name, self.blocks = decoder_blocks(model)
        self.decision = Decision()
        self._check_weights()
        self._walk_arguments = (tokens, dtype, batch_tokens)

    def walk(self) -> BlockWalk | None:
        """The walk over calibration data; None for a method that takes no data."""
        tokens, dtype, batch_tokens = self._walk_arguments
        if not self.method.statistics or tokens is None:
            return None
        return BlockWalk(self.model.base_model, self.blocks, tokens.ids, dtype=dtype, batch_tokens=batch_tokens)

    @singledispatchmethod
    def decide(self, method: Method) -> Decision:
        raise UsageError(f"{method.name} is not a post-training method of this engine")

    # -- single weights ------------------------------------------------------------------------------------------

    @decide.register
    def _(self, method: WeightMethod) -> Decision:
        targets = self._matrices(method)
        if method.pattern:
            _check_pattern(method.pattern, targets)
        elif method.sparsity == 0:
            return self.decision
        if getattr(method, "scope", "") == "global" and not method.pattern:
            return self._decide_globally(method, targets)
        walk = self.walk()
        for layer in range(len(self.blocks)):
            members = [m for m in targets if m.layer == layer]
            block, seen = self._observe(walk, layer, [m.module for m in members], advance=not method.sequential)
            for matrix in members:
                weight = self._prune_matrix(method, matrix, seen.get(matrix.module, {}))
                if block is not None and method.sequential:
                    _write(block, self._inside(matrix.module), weight, matrix.transposed)
            if walk is not None and block is not None and method.sequential:
                walk.advance(block, layer)
            self.progress("prune", layer + 1, len(self.blocks))
        return self.decision

    def _matrices(self, method: WeightMethod) -> list[Matrix]:
        if not self.anatomy.matrices:
            raise UnsupportedModelError(f"{type(self.model).__name__} has no linear weights in its blocks")
        return list(self.anatomy.matrices)

    def _prune_matrix(self, method: WeightMethod, matrix: Matrix, seen: Mapping[str, Any]) -> Tensor:
        """Decide one matrix; returns its pruned weight [outputs, inputs]."""
        target = self._target(matrix.module, "weight", matrix.layer, name=matrix.module)
        keep, weight, notes = method.prune(target, seen)
        stored = keep.T.contiguous() if matrix.transposed else keep
        self.decision.masks[matrix.tensor] = stored.cpu()
        self.decision.notes += notes
        if weight is None:
            return target.weight * keep
        _check_finite(weight, matrix.module, matrix.layer, "compensated weights")
        kept = (weight.T if matrix.transposed else weight)[stored]
        self.decision.values[matrix.tensor] = kept.to(self.model.get_parameter(matrix.tensor).dtype).cpu()
        return weight

    def _decide_globally(self, method: WeightMethod, targets: list[Matrix]) -> Decision:
        """One threshold over all matrices, from statistics of the dense model."""
        walk, scores = self.walk(), {}
        for layer in range(len(self.blocks)):
            members = [m for m in targets if m.layer == layer]
            _, seen = self._observe(walk, layer, [m.module for m in members], advance=True)
            for matrix in members:
                target = self._target(matrix.module, "weight", layer, name=matrix.module)
                scores[matrix] = method.score(target, seen.get(matrix.module, {}))
            self.progress("score", layer + 1, len(self.blocks))
        # one long matrix: the number removed is exact, ties included
        flat = torch.cat([score.flatten().cpu() for score in scores.values()])
        kept = PerMatrix(method.sparsity).keep(flat[None])[0].split([score.numel() for score in scores.values()])
        for matrix, part in zip(scores, kept, strict=True):
            keep = part.reshape(matrix.shape)
            self.decision.masks[matrix.tensor] = keep.T.contiguous() if matrix.transposed else keep
        return self.decision

    # -- heads and neurons ---------------------------------------------------------------------------------------

    @decide.register
    def _(self, method: UnitMethod) -> Decision:
        groups = self._groups(method)
        if method.sparsity == 0:
            return self.decision
        walk, kept_seen = self.walk(), {}
        for layer in range(len(self.blocks)):
            members = [g for g in groups if g.layer == layer]
            readers = [g.reader for g in members if g.reader]
            block, seen = self._observe(walk, layer, readers, advance=not method.sequential)
            self._score_groups(method, members, seen)
            if method.sequential:
                self._allocate(method, members, seen, self._budget(method) // len(self.blocks))
                if walk is not None and block is not None:
                    self._silence(block, members)
                    walk.advance(block, layer)
            else:
                kept_seen.update(seen)
            self.progress("calibrate" if walk else "score", layer + 1, len(self.blocks))
        if not method.sequential:
            self._allocate(method, groups, kept_seen, self._budget(method))
        return self.decision

    def _groups(self, method: UnitMethod) -> list[Group]:
        groups = self.anatomy.of_kind(*method.kinds)
        if not groups:
            raise UnsupportedModelError(unknown_family(self.model))
        return groups

    def _budget(self, method: UnitMethod) -> int:
        return Limits(budget=method.budget).cost(self.anatomy.blocks)

    def _score_groups(self, method: UnitMethod, groups: list[Group], seen: SeenByModule) -> None:
        for group in groups:
            scores = method.score(self._group_target(group), seen.get(group.reader or "", {}))
            _check_finite(scores, group.name, group.layer, "scores")
            self.decision.scores[group.name] = scores.float().cpu()

    def _allocate(self, method: UnitMethod, groups: list[Group], seen: SeenByModule, total: int) -> None:
        limits = Limits(budget=method.budget, min_keep=method.min_keep, round_to=method.round_to)
        scores = {g.name: self.decision.scores[g.name] for g in groups}
        kept = method.allocator().allocate(scores, groups, total, limits)
        for group in groups:
            self.decision.groups[group.name] = group.units
            self.decision.keep[group.name] = kept[group.name]
            gone = _complement(kept[group.name], group.units)
            if len(gone):
                self._compensate(method, group, seen, gone)

    def _compensate(self, method: UnitMethod, group: Group, seen: SeenByModule, gone: Tensor) -> None:
        bias = method.compensate(self._group_target(group), seen.get(group.reader or "", {}), gone)
        if bias is not None:
            _check_finite(bias, group.name, group.layer, "bias compensation")
            self.decision.biases[f"{group.reader}.bias"] = bias.float().cpu()

    def _silence(self, block: nn.Module, groups: list[Group]) -> None:
        """Make the working copy give what the cut block will give."""
        for group in groups:
            reader = block.get_submodule(self._inside(group.reader or ""))
            gone = _complement(self.decision.keep[group.name], group.units)
            columns = group.columns[gone].flatten()
            weight: Tensor = reader.weight  # type: ignore[assignment]
            with torch.no_grad():
                weight.index_fill_(1 if isinstance(reader, nn.Linear) else 0, columns.to(weight.device), 0)
                bias = self.decision.biases.get(f"{group.reader}.bias")
                if bias is not None:
                    old = reader.bias.detach() if reader.bias is not None else 0.0  # type: ignore[union-attr]
                    reader.bias = nn.Parameter((bias.to(weight.device) + old).to(weight.dtype))  # type: ignore[assignment]

    # -- whole blocks --------------------------------------------------------------------------------------------

    @decide.register
    def _(self, method: LayerMethod) -> Decision:
        group = self.anatomy["layers"]
        count = method.layers or int(group.units * method.sparsity)
        if count == 0:
            return self.decision
        if group.frozen:
            raise UnsupportedModelError(f"blocks of {type(self.model).__name__} must stay: {group.frozen}")
        if count >= group.units:
            raise BudgetError(f"can't remove {count} of {group.units} blocks: at least one must stay")
        walk, scores = self.walk(), []
        for layer in range(group.units):
            seen: Mapping[str, Any] = {}
            if walk is not None:
                seen = walk.observe_block(walk.open(layer), layer, method.needed_statistics())
            scores.append(float(method.score(Target(f"layers.{layer}", "layer", layer, torch.empty(0, 0)), seen)))
            self.progress("calibrate", layer + 1, group.units)
        ranked = torch.tensor(scores, dtype=torch.float64)
        _check_finite(ranked, "layers", 0, "scores")
        self.decision.groups["layers"] = group.units
        self.decision.scores["layers"] = ranked.float()
        self.decision.keep["layers"] = ranked.argsort(stable=True)[count:].sort().values
        return self.decision

    # -- shared --------------------------------------------------------------------------------------------------

    def _observe(
        self, walk: BlockWalk | None, layer: int, modules: list[str], *, advance: bool
    ) -> tuple[nn.Module | None, SeenByModule]:
        """(working copy of the block, statistics by full module name)."""
        if walk is None:
            return None, {}
        block = walk.open(layer)
        inside = [self._inside(name) for name in modules]
        seen = walk.observe(block, layer, inside, self.method.needed_statistics(), advance=advance)
        return block, {full: seen[short] for full, short in zip(modules, inside, strict=True)}

    def _inside(self, module: str) -> str:
        """Name of a module within its block."""
        return module.removeprefix(self.name + ".").partition(".")[2]

    def _group_target(self, group: Group) -> Target:
        return self._target(group.reader or "", group.kind, group.layer, name=group.name, columns=group.columns)

    def _target(self, module: str, kind: str, layer: int, *, name: str, columns: Tensor | None = None) -> Target:
        linear = self.model.get_submodule(module)
        weight: Tensor = linear.weight.detach()  # type: ignore[union-attr,assignment,operator]
        weight = weight if isinstance(linear, nn.Linear) else weight.T
        # float64 models are kept as they are: their users want the exact answer
        weight = weight if weight.dtype == torch.float64 else weight.float()
        return Target(name, kind, layer, weight) if columns is None else Target(name, kind, layer, weight, columns)

    def _check_weights(self) -> None:
        for layer, block in enumerate(self.blocks):
            for name, parameter in block.named_parameters():
                _check_finite(parameter.detach(), f"{self.name}.{layer}.{name}", layer, "weights")


def _check_pattern(pattern: str, matrices: list[Matrix]) -> None:
    rule = parse_pattern(pattern)
    for matrix in matrices:
        if matrix.shape[1] % rule.m:
            raise UsageError(
                f"pattern {pattern} needs a multiple of {rule.m} inputs, {matrix.module} has {matrix.shape[1]}"
            )


def _check_finite(values: Tensor, where: str, layer: int, what: str) -> None:
    if not bool(torch.isfinite(values).all()):
        bad = int((~torch.isfinite(values)).sum())
        raise NonFiniteError(f"layer {layer}, {where}: {bad} of {values.numel()} {what} are NaN or inf")


def _complement(kept: Tensor, units: int) -> Tensor:
    gone = torch.ones(units, dtype=torch.bool)
    gone[kept] = False
    return gone.nonzero().flatten()


def _write(block: nn.Module, name: str, weight: Tensor, transposed: bool) -> None:
    """Put a pruned weight [outputs, inputs] into the working copy of a block."""
    parameter: Tensor = block.get_submodule(name).weight  # type: ignore[assignment]
    with torch.no_grad():
        parameter.copy_(weight.T if transposed else weight)
