"""Heads and neurons that leave while adapters are trained, on the whole model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn

from secateur.allocate.units import Kept, Limits
from secateur.engine import search
from secateur.engine.keeping import Decision, Keeper
from secateur.engine.run import Run
from secateur.engine.units import limits_of
from secateur.errors import BudgetError, UsageError
from secateur.healing.recovery import Curve
from secateur.healing.recovery.shrinking import Shrinking
from secateur.healing.recovery.trained import targets
from secateur.healing.recovery.trainer import Windows, recover
from secateur.loop import Keeper as TrainingKeeper
from secateur.methods import TrainedMethod
from secateur.structure import Group

_LOSSES = "losses"


def decide_trained(method: TrainedMethod, run: Run) -> None:
    """Kept units, and what training makes of the weights. Raises UsageError, BudgetError, MissingExtraError."""
    if method.idle:
        return
    if run.ranks.size > 1:
        raise UsageError(f"{method.name} trains the whole model in one process: start it without torchrun")
    groups = run.anatomy.of_kind(*method.kinds)
    tokens = run.tokens
    assert tokens is not None
    _check_last(method, run, groups)
    for _ in run.blocks("check"):
        pass
    run.source.release()
    whole = run.source.whole(torch.float32)
    shrinking = Shrinking(
        groups,
        method.entries,
        partial(_kept_after, method, run, groups),
        beta=method.beta,
        normalised=method.normalised,
        gradients=method.needs_gradient,
    )
    matrices = [m.module for m in run.anatomy.matrices]
    curve = recover(
        whole,
        Windows(tokens.ids, tokens.ids[:0]),
        method.recovery("bfloat16" if run.dtype == torch.bfloat16 else "float32"),
        modules=matrices,
        callback=shrinking,
        keeper=_States(run.keeper),
        progress=lambda _, done, total: run.progress("train", done, total),
    )
    told = Decision(notes=[_told(method, curve, tokens.ids.shape[1])])
    decided = _decided(run, groups, shrinking.kept, whole, targets(method.targets, matrices))
    run.keeper.close(chain([told], decided))


def _told(method: TrainedMethod, curve: Curve, length: int) -> str:
    """What a plan says of the training."""
    part = max(1, curve.steps // 10)
    means = [sum(losses) / part for losses in (curve.losses[:part], curve.losses[-part:])]
    events = [step for step in range(1, method.steps + 1) if method.removed_at(step) is not None]
    return (
        f"trained on {curve.steps * method.batch * length} tokens, while units left at {len(events)} of {method.steps}"
        f" steps, from {events[0]} to {events[-1]}: loss {means[0]:.3f} in the first tenth of the steps,"
        f" {means[1]:.3f} in the last"
    )


def _kept_after(
    method: TrainedMethod, run: Run, groups: list[Group], step: int, scores: Mapping[str, Tensor]
) -> Kept | None:
    fraction = method.removed_at(step)
    if fraction is None:
        return None
    total = Limits(budget=method.budget).cost(run.anatomy.blocks)
    return method.allocator(fraction).allocate(scores, groups, total, limits_of(method))


def _check_last(method: TrainedMethod, run: Run, groups: list[Group]) -> None:
    """Refuse what can't be met, or comes to nothing, before anything is trained. Raises BudgetError."""
    alike = {g.name: torch.zeros(g.units) for g in groups}
    for step in range(method.steps, 0, -1):
        kept = _kept_after(method, run, groups, step, alike)
        if kept is not None:
            break
    else:
        raise BudgetError(f"{method.name}: in {method.steps} steps nothing would leave: take more, or a smaller every")
    if all(len(kept[g.name]) == g.units for g in groups):
        raise BudgetError(
            f"{method.name}: the share that is asked for comes to less than one unit of every group: raise it"
        )


class _States(TrainingKeeper):
    """Keeps the state of the training where the state of a search is kept."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
        # the first step is kept at once
        self._last = float("-inf")

    def restored(self) -> tuple[Curve, Mapping[str, Tensor]] | None:
        state = self._keeper.searched()
        if state is None:
            return None
        return Curve(0, losses=state[_LOSSES].tolist()), state

    def finished(self, curve: Curve, state: Callable[[], Mapping[str, Tensor]], *, last: bool) -> None:
        if last or time.monotonic() - self._last >= search.SECONDS_BETWEEN_STATES:
            losses = torch.tensor(curve.losses, dtype=torch.float64)
            self._keeper.search({**state(), _LOSSES: losses}, curve.steps)
            self._last = time.monotonic()


def _decided(run: Run, groups: list[Group], kept: Kept, whole: nn.Module, trained: list[str]) -> Iterator[Decision]:
    """What is left, block by block, with its trained weights; what leaves is cut and not zeroed."""
    for layer in range(run.layers):
        part = Decision()
        for group in groups:
            if group.layer == layer:
                part.groups[group.name], part.keep[group.name] = group.units, kept[group.name]
        for matrix in run.anatomy.matrices:
            if matrix.layer == layer and matrix.module in trained:
                weight: Tensor = whole.get_submodule(matrix.module).weight.detach()  # type: ignore[assignment]
                part.masks[matrix.tensor] = torch.ones(weight.shape, dtype=torch.bool)
                # no copy where nothing is converted: all of them together are as large as the model
                dtype = run.source.origin(matrix.tensor).dtype
                part.values[matrix.tensor] = weight.flatten().to("cpu", dtype)
        yield part
