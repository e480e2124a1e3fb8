"""Pruning in steps, with the user's training between them.

Every step removes the same share of what is left, so that after the last one ``sparsity`` of the whole is gone:

    s_step = 1 - (1 - s)^(1 / steps)

Scores are taken anew from the network as the training before has left it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from secateur.errors import NonFiniteError, UnsupportedModelError, UsageError
from secateur.finite import all_finite
from secateur.methods import ChannelMethod
from secateur.networks.kinds import Asked, Network
from secateur.plans import Plan

TrainFn = Callable[[nn.Module, int], Any]
"""Gets the cut module and the number of the step, from 1, and trains the module in place."""


@dataclass(frozen=True)
class Steps:
    """The cut and trained network, the plan in the units of the dense one, and what the user should know."""

    network: Any
    plan: Plan
    dense: Network
    notes: tuple[str, ...]


def prune_in_steps(
    model: Any,
    method: ChannelMethod,
    opened: Callable[[Any], Network],
    *,
    steps: int,
    train_fn: TrainFn | None = None,
    inplace: bool = False,
    optimizer: Any = None,
    asked: Asked,
) -> Steps:
    """Plan, cut and train ``steps`` times; a single step without training is the plain case.

    Raises UsageError, what planning and cutting raise, and NonFiniteError when training breaks the network.
    """
    if steps < 1:
        raise UsageError(f"steps must be at least 1, got {steps}")
    if train_fn is not None and not callable(train_fn):
        raise UsageError(f"train_fn must be a function of the module and the step, got {type(train_fn).__name__}")
    if (steps > 1 or train_fn is not None) and not isinstance(model, nn.Module):
        raise UsageError("steps and train_fn are for torch modules, which can be trained; an ONNX model is cut once")
    once = replace(method, sparsity=_of_one(method.sparsity, steps)) if steps > 1 else method
    ratios = {pattern: _of_one(ratio, steps) for pattern, ratio in asked.ratios.items()} if steps > 1 else asked.ratios
    network = dense = opened(model)
    plans: list[Plan] = []
    notes: dict[str, None] = {}
    for step in range(1, steps + 1):
        if step > 1:
            network = opened(model)
        plans.append(network.plan(once, replace(asked, ratios=ratios)))
        model, told = network.cut(plans[-1], inplace=inplace, optimizer=optimizer)
        notes |= dict.fromkeys(told)
        if train_fn is not None:
            _train(model, train_fn, step)
    trained = steps > 1 or train_fn is not None
    plan = _joined(plans, method, asked, steps) if trained else plans[0]
    return Steps(model, plan, dense, tuple(notes))


def _of_one(whole: float, steps: int) -> float:
    """The fraction that leaves in one of several steps."""
    return 1 - (1 - whole) ** (1 / steps)


def _train(module: nn.Module, train_fn: TrainFn, step: int) -> None:
    shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
    train_fn(module, step)
    for name, tensor in module.state_dict().items():
        if tensor.shape != shapes.get(name):
            raise UsageError(f"train_fn must leave the shapes of the module alone; {name} changed in step {step}")
        if not all_finite(tensor):
            raise NonFiniteError(f"{name} holds NaN or inf after the training of step {step}")


def _joined(plans: Sequence[Plan], method: ChannelMethod, asked: Asked, steps: int) -> Plan:
    """What is left after all steps, as one plan for the dense network; its values were trained away."""
    first = plans[0]
    keep = dict(first.keep)
    for plan in plans[1:]:
        for name, kept in plan.keep.items():
            if name not in keep or plan.groups[name] != len(keep[name]):
                raise UnsupportedModelError(f"{name} couples other channels after a cut, so it can't be cut in steps")
            keep[name] = keep[name][kept]
    note = f"cut in {steps} steps, trained after each: the plan holds the widths, the trained weights are the module's"
    whole = {"ratios": dict(asked.ratios)} if asked.ratios else {}
    provenance = first.provenance[0].model_copy(
        update={
            "options": {**first.provenance[0].options, **whole, "sparsity": method.sparsity, "steps": steps},
            "notes": (*dict.fromkeys(n for plan in plans for n in plan.provenance[0].notes), note),
        }
    )
    return Plan(provenance=(provenance,), groups=first.groups, keep=keep, scores=first.scores)
