"""Heads and neurons, a few at a time from the whole model, which is looked at anew as it gets smaller."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur.allocate.iterative import due, taken
from secateur.allocate.units import Bundle, Limits, bundles, largest_share, least_bundles, refusal
from secateur.criteria.groups import reduce_slices
from secateur.engine.keeping import Decision
from secateur.engine.run import Run, complement
from secateur.errors import NonFiniteError, UsageError
from secateur.finite import all_finite
from secateur.healing.recovery.losses import cross_entropy
from secateur.methods import IterativeMethod
from secateur.models.decoders import decoder_blocks
from secateur.structure import Group

_STEP = "removal"
# rounds without a unit that leaves, after which blocks lose alike: a key-value head takes many small steps
_PATIENCE = 20


def decide_iteratively(method: IterativeMethod, run: Run) -> None:
    """Kept units, by steps that go on behind the last one that was noted. Raises UsageError, BudgetError."""
    groups = [g for g in run.anatomy.of_kind(*method.kinds) if method.cuts(g.layer, run.layers)]
    if method.idle:
        return
    if run.ranks.size > 1:
        raise UsageError(f"{method.name} works on the whole model, in one process: start it without torchrun")
    limits = Limits(budget=method.budget, min_keep=method.min_keep, round_to=method.round_to)
    total = limits.cost(run.anatomy.blocks)
    removable = largest_share(groups, limits) * sum(g.units * limits.cost(g.cost) for g in groups)
    if method.sparsity * total > removable:
        raise refusal(method.sparsity, removable, total, limits)
    for layer in range(run.layers):
        for name, tensor in run.source.block_tensors(layer).items():
            run.source.check(name, tensor, layer)
    steps = _Steps(method, run, groups, limits, method.sparsity * total)
    steps.finish()
    run.keeper.close(iter([steps.decision()]))


class _Steps:
    """The model on its way; ``sparsities`` are the nominal ones of the blocks that lose something."""

    def __init__(self, method: IterativeMethod, run: Run, groups: list[Group], limits: Limits, target: float) -> None:
        assert run.tokens is not None
        self._method, self._run, self._groups, self._limits = method, run, groups, limits
        self._target, self._ids = target, run.tokens.ids
        self._model: Any = run.source.whole(run.dtype).requires_grad_(False)
        self._layers = sorted({g.layer for g in groups})
        self._sparsities = np.zeros(len(self._layers))
        self._gone = {g.name: torch.zeros(0, dtype=torch.int64) for g in groups}
        self._rounds = self._idle = self._even = 0
        self._resume()

    @property
    def _removed(self) -> int:
        return sum(len(self._gone[g.name]) * self._limits.cost(g.cost) for g in self._groups)

    def _costs(self) -> list[int]:
        """What one bundle costs, of every group that can still lose one."""
        return [self._size(g) * self._limits.cost(g.cost) for g in self._groups if self._can_lose(g)]

    def _can_lose(self, group: Group) -> bool:
        left = group.units - len(self._gone[group.name])
        return left - self._size(group) >= self._limits.min_keep * group.balance

    def _size(self, group: Group) -> int:
        """The units of the bundle that leaves next: a remainder that doesn't fill one is the first."""
        if group.kind != "neuron":
            return group.balance
        left = group.units - len(self._gone[group.name])
        return left % self._limits.round_to or self._limits.round_to

    def finish(self) -> None:
        """Go on until nothing that could leave brings the model nearer to its target."""
        while (costs := self._costs()) and self._target - self._removed > min(costs) / 2:
            self._round(min(costs), max(costs))
            self._rounds += 1
            self._run.progress(_STEP, min(self._removed, int(self._target)), int(self._target))

    def decision(self) -> Decision:
        """What is left."""
        low, high = float(self._sparsities.min()), float(self._sparsities.max())
        part = Decision(notes=[f"{self._rounds} looks at the model; nominal sparsities {low:.3f} to {high:.3f}"])
        if self._even:
            part.notes.append(
                "blocks that could lose something gained as much as a step takes before the budget was met: in"
                f" {self._even} step{'s' if self._even > 1 else ''} all lost alike"
            )
        for group in self._groups:
            part.groups[group.name] = group.units
            part.keep[group.name] = complement(self._gone[group.name], group.units)
        return part

    def _resume(self) -> None:
        noted = self._run.keeper.noted(_STEP)
        if not noted:
            return
        self._rounds = max(noted) + 1
        last = noted[self._rounds - 1]
        self._sparsities, self._idle, self._even = np.array(last["sparsities"]), last["idle"], last["even"]
        for group in self._groups:
            for step in noted.values():
                self._leave(group, torch.tensor(step["gone"].get(group.name, []), dtype=torch.int64))

    def _round(self, finest: int, coarsest: int) -> None:
        importance, scores = self._look()
        gone: dict[str, list[int]] = {}
        for _ in range(self._method.refresh):
            after = self._method.advance(self._sparsities, importance)
            if self._at_rest(after):
                after = np.minimum(self._sparsities + self._method.step, 1.0)
                self._even += 1
            found = self._due(scores, after, finest)
            if not found and self._target - self._removed < coarsest:
                # what is due is too large for what is left to remove: others make up for it
                found = self._due(scores, after, finest, further=True)
            for bundle in found:
                gone.setdefault(bundle.group, []).extend(bundle.units.tolist())
            self._sparsities = after
        self._idle = 0 if gone else self._idle + 1
        entry = {"sparsities": self._sparsities.tolist(), "gone": gone, "idle": self._idle, "even": self._even}
        self._run.keeper.note(_STEP, self._rounds, entry)

    def _at_rest(self, after: np.ndarray) -> bool:
        """Whether no block that can still lose something is about to, so that the budget would never be met."""
        left = {g.layer for g in self._groups if self._can_lose(g)}
        moving = [after[i] > self._sparsities[i] + 1e-12 for i, layer in enumerate(self._layers) if layer in left]
        return self._idle >= _PATIENCE or not any(moving)

    def _due(self, scores: dict[str, Tensor], after: np.ndarray, finest: int, *, further: bool = False) -> list[Bundle]:
        """What leaves in one step, and is out of the model when this returns."""
        every = []
        for group in self._groups:
            place, gone = self._layers.index(group.layer), self._gone[group.name]
            worth = scores[group.name].index_fill(0, gone, -math.inf)
            ordered = bundles(group, worth, self._limits)
            least = least_bundles(group, ordered, self._limits)
            left, count = [], 0
            for bundle in ordered:
                count += len(bundle.units)
                if count <= group.units - len(gone):
                    left.append(bundle)
            step = (float(self._sparsities[place]), float(after[place]))
            every += due(group, reversed(left[least:]), len(gone), *step, further=further)
        found = taken(every, self._removed, self._target, finest)
        for group in self._groups:
            for bundle in found:
                if bundle.group == group.name:
                    self._leave(group, bundle.units)
        return found

    @torch.no_grad()
    def _leave(self, group: Group, units: Tensor) -> None:
        """Silence these units: with all that belongs to them zero, what is left has the gradients of a cut model."""
        self._gone[group.name] = torch.cat([self._gone[group.name], units]).sort().values
        for part in group.slices:
            tensor: Tensor = self._model.get_parameter(part.tensor)
            tensor.index_fill_(part.dim, part.index[units].flatten().to(tensor.device), 0)

    def _look(self) -> tuple[np.ndarray, dict[str, Tensor]]:
        """How much every block counts, and the score of every unit by group, on windows of this round."""
        names = dict.fromkeys(part.tensor for g in self._groups for part in g.slices)
        weights = {name: p for name in names if (p := self._model.get_parameter(name)).dim() > 1}
        ids = self._windows()
        at_once = max(1, self._run.batch_tokens // ids.shape[1])
        for weight in weights.values():
            weight.requires_grad_(True)
        with watched(decoder_blocks(self._model)[1], self._layers, self._method) as seen, torch.enable_grad():
            for part in ids.to(self._model.device).split(at_once):
                loss = cross_entropy(self._model(input_ids=part, use_cache=False).logits, part) * len(part) / len(ids)
                if not math.isfinite(float(loss.detach())):
                    raise NonFiniteError(f"the loss of round {self._rounds + 1} is NaN or inf: try --dtype float32")
                loss.backward()
        gradients = {}
        for name, weight in weights.items():
            gradients[name], weight.grad = weight.grad, None
            weight.requires_grad_(False)
        return np.array([seen.totals[layer] for layer in self._layers]), self._scores(weights, gradients)

    def _scores(self, weights: dict[str, Any], gradients: dict[str, Any]) -> dict[str, Tensor]:
        salience = {
            name: self._method.salience(weight.detach().float(), gradients[name].float())
            for name, weight in weights.items()
            if gradients[name] is not None
        }
        found = {}
        for group in self._groups:
            total = torch.zeros(group.units, dtype=torch.float64)
            for part in group.slices:
                if part.tensor in salience:
                    total += reduce_slices(salience[part.tensor], part.dim, part.index, "sum").cpu()
            if not all_finite(total):
                raise NonFiniteError(f"scores of {group.name} are NaN or inf: try --dtype float32")
            found[group.name] = total
        return found

    def _windows(self) -> Tensor:
        """The windows of this round, [windows, length] int64."""
        count = self._method.step_windows
        if not count or count >= len(self._ids):
            return self._ids
        drawn = torch.Generator().manual_seed(self._method.seed * 1_000_003 + self._rounds)
        return self._ids[torch.randperm(len(self._ids), generator=drawn)[:count].sort().values]


@dataclass
class Watched:
    """What was seen of blocks so far, summed over tokens, by layer."""

    totals: dict[int, float]


@contextmanager
def watched(blocks: nn.ModuleList, layers: Sequence[int], method: IterativeMethod) -> Iterator[Watched]:
    """Let ``method`` look at what enters these blocks and what leaves them, as long as this lasts."""
    seen = Watched(dict.fromkeys(layers, 0.0))
    handles = []

    def watch(layer: int) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            with torch.no_grad():
                seen.totals[layer] += float(method.importance(before.detach().float(), after.detach().float()))

        return hook

    try:
        for layer in layers:
            handles.append(blocks[layer].register_forward_hook(watch(layer), with_kwargs=True))
        yield seen
    finally:
        for handle in handles:
            handle.remove()
