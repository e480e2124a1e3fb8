"""The training loop: AdamW, a warm-up and half a cosine, and a state from which it goes on to the bit.

Nothing that happens in a step depends on how the process got there: the windows of a step, its learning rate and its
random numbers follow from the seed and the number of the step alone. What has to be kept between two sittings are the
trained parameters and the two moments of AdamW.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from secateur.errors import DataError, NonFiniteError, UsageError, require_extra
from secateur.healing.recovery.curve import Curve
from secateur.healing.recovery.losses import Objective
from secateur.healing.recovery.options import RecoveryOptions
from secateur.healing.recovery.trained import STRATEGIES, Trained
from secateur.ranks import ALONE, Ranks

Progress = Callable[[str, int, int], None]
_MOMENTS = ("exp_avg", "exp_avg_sq")
_CALLBACK = "callback/"


class Keeper(Protocol):
    """Keeps what is finished; in memory there is nothing to keep."""

    def restored(self) -> tuple[Curve, Mapping[str, Tensor]] | None:
        """Where an earlier sitting ended, or None."""
        return None

    def finished(self, curve: Curve, state: Callable[[], Mapping[str, Tensor]], *, last: bool) -> None:
        """A step has ended, maybe the ``last``; ``state`` gives what ``restored`` is to give. May end the sitting."""


class _Forgetful(Keeper):
    pass


class Callback:
    """What takes part in every step of a training, between its gradients and what the optimiser makes of them."""

    def begin(self, model: Any) -> None:
        """Training begins, or goes on; adapters are laid. What is done to the model here, ``end`` undoes."""

    def on_pre_optimizer_step(self, step: int) -> None:
        """The step with this number, from 1, has its gradients: of all windows, masked and clipped."""

    def end(self) -> None:
        """Training has ended, well or not; adapters are still there."""

    def state(self) -> Mapping[str, Tensor]:
        """What a later sitting needs to go on to the bit."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Be what ``state`` was taken from; after ``begin``."""


@dataclass(frozen=True)
class Windows:
    """Token ids, ``trained_on`` [windows, length] and ``held_out`` [windows, length], int64 on the CPU."""

    trained_on: Tensor
    held_out: Tensor


def learning_rate(step: int, options: RecoveryOptions) -> float:
    """Of the step with this number, from 0, among those of all stages: rises linearly to its peak, then as scheduled.

    A ``cosine`` begins above 0 and falls as half a cosine towards 0. A ``wsd`` (warm-up, stable, decay; Adapt-Pruner,
    arXiv:2502.03460) begins at 0, stays at the peak, and falls linearly in the end.
    """
    steps = options.whole
    warm = round(options.warmup * steps)
    if options.schedule == "wsd":
        rising = step / warm if warm else 1.0
        cool = round(options.cooldown * steps)
        falling = 1 - (1 - options.floor) * (step - (steps - cool)) / cool if cool else 1.0
        return options.peak_rate * min(1.0, rising, falling)
    if step < warm:
        return options.peak_rate * (step + 1) / warm
    return options.peak_rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def windows_of(step: int, options: RecoveryOptions, available: int) -> Tensor:
    """The windows of a step, [batch] int64: every window once in an order of its own, then all of them in another."""
    places = range(step * options.batch, (step + 1) * options.batch)
    orders: dict[int, Tensor] = {}
    for epoch in {place // available for place in places}:
        generator = torch.Generator().manual_seed(options.seed * 1_000_003 + epoch)
        orders[epoch] = torch.randperm(available, generator=generator)
    return torch.stack([orders[place // available][place % available] for place in places])


def recover(
    model: Any,
    windows: Windows,
    options: RecoveryOptions,
    *,
    teacher: nn.Module | None = None,
    layers: Sequence[int] = (),
    modules: Sequence[str] = (),
    masks: Mapping[str, Tensor] | None = None,
    lora_ranks: Mapping[str, int] | None = None,
    callback: Callback | None = None,
    keeper: Keeper | None = None,
    measure: Callable[[Any], float] | None = None,
    ranks: Ranks = ALONE,
    progress: Progress = lambda stage, done, total: None,
) -> Curve:
    """Train ``model`` in place, on its device; returns the curve. Afterwards it is an ordinary model in eval mode.

    ``modules`` are the names of those that can have adapters, ``masks`` (boolean, True = kept) what must stay zero,
    ``layers`` the blocks of ``teacher`` that the blocks of the model came from, ``lora_ranks`` ranks by module where
    they differ; ``callback`` takes part in every step. ``measure`` gives the held-out perplexity of a model. All
    ``ranks`` call this together and share the windows of every step. After an error adapters are gone; with ``full``
    and ``norms`` the model stays where it was. Raises UsageError, DataError, NonFiniteError when a loss is NaN,
    MissingExtraError, and what ``callback`` and ``keeper`` raise.
    """
    if len(windows.trained_on) == 0:
        raise DataError("there is nothing to train on: the text has no window beside those that are held out")
    objective = Objective(options.terms(teacher is not None), options.temperature, teacher, layers)
    trained = STRATEGIES[options.train](model, options, masks or {}, modules=modules, ranks=lora_ranks)
    taking_part = callback or Callback()
    try:
        loop = _Loop(model, trained, objective, windows.trained_on, options, ranks, taking_part)
        taking_part.begin(model)
        curve = loop.run(keeper or _Forgetful(), measure, progress)
    except BaseException:
        taking_part.end()
        trained.finish(learnt=False)
        raise
    finally:
        model.eval()
    taking_part.end()
    trained.finish()
    return curve


class _Loop:
    def __init__(
        self,
        model: Any,
        trained: Trained,
        objective: Objective,
        ids_NT: Tensor,
        options: RecoveryOptions,
        ranks: Ranks,
        callback: Callback,
    ) -> None:
        accelerate = require_extra("accelerate", "train", "recovery training")
        self._model, self._trained, self._objective = model, trained, objective
        self._ids_NT, self._options, self._ranks, self._callback = ids_NT, options, ranks, callback
        self._device = model.device
        micro = options.micro or max(1, options.batch // ranks.size)
        if options.batch % (micro * ranks.size):
            raise UsageError(
                f"batch {options.batch} can't be shared by {ranks.size} rank{'s' if ranks.size > 1 else ''} in forwards"
                f" of {micro} windows: let it be a multiple of {micro * ranks.size}"
            )
        self._micro = micro
        self._parameters = trained.parameters
        self._optimizer = torch.optim.AdamW(self._parameters.values(), lr=0.0, weight_decay=options.decay)
        self._accelerator = accelerate.Accelerator(cpu=self._device.type == "cpu", mixed_precision="no")
        # ranks keep equal parameters by equal steps; the wrapper means their gradients
        self._wrapped = self._accelerator.prepare(model) if ranks.size > 1 else model

    def run(self, keeper: Keeper, measure: Callable[[Any], float] | None, progress: Progress) -> Curve:
        options = self._options
        restored = keeper.restored()
        if restored is None:
            curve = Curve(options.batch * self._ids_NT.shape[1])
            self._measure(curve, measure)
        else:
            curve = restored[0]
            self._restore(curve.steps, restored[1])
        with self._training():
            while curve.steps < options.steps:
                started = time.perf_counter()
                loss = self._step(curve.steps)
                if not math.isfinite(loss):
                    raise NonFiniteError(
                        f"the loss of step {curve.steps + 1} is NaN or inf: try a lower --lr than"
                        f" {options.peak_rate:g}, or float32; nothing was written"
                    )
                curve.losses.append(loss)
                curve.seconds += time.perf_counter() - started
                if curve.steps % options.measured_every == 0 or curve.steps == options.steps:
                    self._measure(curve, measure)
                progress("heal", curve.steps, options.steps)
                keeper.finished(curve, self._state, last=curve.steps == options.steps)
        return curve

    def _training(self) -> ExitStack:
        stack = ExitStack()
        devices = [self._device] if self._device.type == "cuda" else []
        stack.enter_context(torch.random.fork_rng(devices=devices))
        if self._options.checkpointing:
            # newer transformers have another name for it
            kind = "activation" if hasattr(self._model, "activation_checkpointing_enable") else "gradient"
            getattr(self._model, f"{kind}_checkpointing_enable")({"use_reentrant": False})
            stack.callback(getattr(self._model, f"{kind}_checkpointing_disable"))
        self._wrapped.train()
        return stack

    def _step(self, step: int) -> float:
        """One step of the optimiser; the mean loss of its windows, over all ranks."""
        options, ranks = self._options, self._ranks
        # later stages go on with data, learning rate and random numbers
        step += options.done
        mine = windows_of(step, options, len(self._ids_NT)).tensor_split(ranks.size)[ranks.rank]
        parts = mine.split(self._micro)
        # of dropout: the same numbers whenever and wherever this step is done
        torch.manual_seed((options.seed * 1_000_003 + step) * ranks.size + ranks.rank)
        total = torch.zeros((), device=self._device)
        for number, part in enumerate(parts, start=1):
            alone = ranks.size == 1 or number == len(parts)
            # ranks exchange gradients once, when all of them are there
            with nullcontext() if alone else self._accelerator.no_sync(self._wrapped), self._precision():
                loss = self._objective(self._wrapped, self._ids_NT[part].to(self._device)) / len(parts)
            self._accelerator.backward(loss)
            total += loss.detach().float()
        self._trained.mask_gradients()
        if options.clip:
            torch.nn.utils.clip_grad_norm_(list(self._parameters.values()), options.clip)
        self._callback.on_pre_optimizer_step(step + 1)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(step, options)
        value = self._mean(total)
        # a step with a broken loss is not taken
        if math.isfinite(value):
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return value

    def _mean(self, total: Tensor) -> float:
        if self._ranks.size == 1:
            return float(total)
        reduced: Any = self._accelerator.reduce(total, "mean")
        return float(reduced)

    def _precision(self) -> Any:
        if self._options.dtype == "float32":
            return nullcontext()
        return torch.autocast(self._device.type, dtype=torch.bfloat16)

    def _measure(self, curve: Curve, measure: Callable[[Any], float] | None) -> None:
        if measure is not None:
            curve.measured.append((curve.steps, self._ranks.on_main(lambda: measure(self._model))))
            self._wrapped.train()

    def _state(self) -> dict[str, Tensor]:
        """The trained parameters and their moments, by name, and what the callback has."""
        found: dict[str, Tensor] = {f"parameter/{name}": p.detach() for name, p in self._parameters.items()}
        found |= {f"{_CALLBACK}{name}": tensor for name, tensor in self._callback.state().items()}
        for name, parameter in self._parameters.items():
            found |= {f"{moment}/{name}": self._optimizer.state[parameter][moment] for moment in _MOMENTS}
        return found

    def _restore(self, steps: int, state: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(state[f"parameter/{name}"])
                moments = {moment: state[f"{moment}/{name}"].to(parameter.device).clone() for moment in _MOMENTS}
                self._optimizer.state[parameter] = {"step": torch.tensor(float(steps)), **moments}
        self._callback.restore({n.removeprefix(_CALLBACK): t for n, t in state.items() if n.startswith(_CALLBACK)})
