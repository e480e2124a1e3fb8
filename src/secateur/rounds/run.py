"""One training by the user's own function: what it is told, what holds while it runs, and what is checked behind it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from secateur.drawing import seeded
from secateur.errors import UsageError
from secateur.rowmasks import clear_dead
from secateur.train.watching import mask_state

START = "start"
"""The branch of the training up to the step that is gone back to."""


@dataclass(frozen=True)
class Run:
    """What a training function is told beside the network.

    It trains from step ``first_step`` of its schedule to ``last_step``, or to its own end where that is None;
    ``for step in run.steps(1500)`` are these steps. ``seed`` decides the order of batches. ``level`` counts removals,
    ``branch`` is ``ticket``, the name of a control, or ``start`` for the training up to the step that is gone back to.
    ``masks`` are boolean by the name of the weight, True = live: they hold by themselves after every step of an
    optimizer of torch. Whoever changes weights without one calls ``hold`` after each change.
    """

    seed: int = 0
    level: int = 0
    branch: str = "ticket"
    first_step: int = 0
    last_step: int | None = None
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    hold: Callable[[], None] = lambda: None

    def steps(self, total: int) -> range:
        """The steps of this run, of a training that has ``total``. Raises UsageError when it starts behind its end."""
        if self.first_step > total or (self.last_step or 0) > total:
            late = max(self.first_step, self.last_step or 0)
            raise UsageError(f"step {late} is gone back to, but the training has {total} steps: take an earlier one")
        return range(self.first_step, total if self.last_step is None else self.last_step)

    def forward(self, scheduler: Any) -> None:
        """Step a new scheduler of learning rates to ``first_step``."""
        with warnings.catch_warnings():
            # that no optimizer has stepped yet is the point
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            for _ in range(self.first_step):
                scheduler.step()


TrainFunction = Callable[[nn.Module, Run], "Mapping[str, float] | float | None"]
"""Trains the network in place as the run says; what it returns are numbers by name, kept beside those of evaluation."""
EvaluateFunction = Callable[[nn.Module], "Mapping[str, float] | float"]
"""Numbers by name of a network; a single one is called ``accuracy``."""


class Held:
    """Masks on the weights of a network, which hold after every step of any optimizer within ``training``."""

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
        own = dict(model.named_parameters())
        self._dead = {own[name]: mask for name, mask in masks.items() if not bool(mask.all())}
        self._names = {own[name]: name for name in masks}
        self._parameters = set(own.values())
        self._steps: dict[int, int] = {}
        self.apply()

    @property
    def steps(self) -> int:
        """How many steps were taken, by the optimizer that took the most."""
        return max(self._steps.values(), default=0)

    def apply(self) -> None:
        """Zero what is dead."""
        for weight in self._dead:
            clear_dead(weight.data, self._mask(weight))

    def moved(self) -> str | None:
        """The name of a weight with dead entries that aren't zero."""
        moved = (weight for weight in self._dead if bool(weight.detach()[~self._mask(weight)].any()))
        return next((self._names[weight] for weight in moved), None)

    def after_step(self, optimizer: Optimizer, *_: Any) -> None:
        """As a hook of all optimizers."""
        own = {p for group in optimizer.param_groups for p in group["params"]} & self._parameters
        broken = getattr(optimizer, "found_inf", None)
        if not own or (broken is not None and float(broken)):
            return
        self._steps[id(optimizer)] = self._steps.get(id(optimizer), 0) + 1
        for weight in own:
            if weight in self._dead:
                clear_dead(weight.data, self._mask(weight))
                mask_state(optimizer, weight, self._mask(weight))

    def _mask(self, weight: nn.Parameter) -> Tensor:
        # the training function may move the network to another device, once
        if self._dead[weight].device != weight.device:
            self._dead[weight] = self._dead[weight].to(weight.device)
        return self._dead[weight]


def trained(model: nn.Module, train: TrainFunction, run: Run, length: int = 0) -> tuple[dict[str, float], int]:
    """Train the network in place; (what the function returned, steps that were taken). Weights may only be those of
    ``run.masks`` afterwards. Numbers that torch, numpy and random draw follow from the seed of the run, and what
    others draw afterwards doesn't depend on it. ``length`` is that of the whole training, or 0.

    Raises UsageError when the function doesn't do what the run says.
    """
    held = Held(model, run.masks)
    told = Run(**{**run.__dict__, "hold": held.apply})
    with seeded(run.seed):
        hook = register_optimizer_step_post_hook(held.after_step)
        try:
            returned = train(model, told)
        finally:
            hook.remove()
    name = held.moved()
    if name is not None:
        raise UsageError(
            f"the training function moved weights of {name} that were removed: train with an optimizer of torch, or"
            " call run.hold() after every change"
        )
    _check_steps(run, held.steps, length)
    return numbers(returned), held.steps


def numbers(returned: Mapping[str, float] | float | None) -> dict[str, float]:
    """What a function returned as numbers by name. Raises UsageError."""
    if returned is None:
        return {}
    named = returned if isinstance(returned, Mapping) else {"accuracy": returned}
    try:
        return {str(key): float(value) for key, value in named.items()}
    except (TypeError, ValueError):
        raise UsageError(f"a training or evaluation gives numbers by name, got {returned!r}") from None


def _check_steps(run: Run, taken: int, length: int) -> None:
    last = run.last_step if run.last_step is not None else length
    if not last:
        return
    # a gradient scaler may leave some out
    if taken > last - run.first_step:
        raise UsageError(
            f"the training function took {taken} steps where it was asked for those from {run.first_step} to {last}:"
            " it must start at run.first_step and stop at run.last_step, as `for step in run.steps(total)` does"
        )
    if run.branch == START and not taken:
        raise UsageError(
            f"the training function took no step of an optimizer on its way to step {last}, which is gone back to"
        )
