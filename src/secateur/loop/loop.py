"""Steps of an optimiser, and a state from which they go on to the bit.

What has to be kept between two sittings are the trained parameters, buffers that a checkpoint holds, what the
optimiser remembers of every parameter, and what callbacks have.
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
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from secateur.drawing import apart
from secateur.errors import NonFiniteError, UsageError, require_extra
from secateur.loop.order import examples_of, step_seed
from secateur.loop.rates import Rate
from secateur.ranks import ALONE, Ranks
from secateur.ranks.shards import is_sharded
from secateur.rowmasks import local, shard_like, whole

Progress = Callable[[str, int, int], None]
_CALLBACK, _PARAMETER, _BUFFER, _OPTIMIZER = "callback/", "parameter/", "buffer/", "optimizer/"


class Curve(Protocol):
    """What training gave so far: the loss of every step, and the seconds of all sittings without measurements."""

    losses: list[float]
    seconds: float

    @property
    def steps(self) -> int:
        """How many steps are done."""
        ...

    def to_json(self) -> str:
        """As a JSON document, from which numbers come back to the bit."""
        ...


class Keeper(Protocol):
    """Keeps what is finished; in memory there is nothing to keep."""

    def reads(self, sha256: str) -> None:
        """What is trained on has this hash; may refuse another text than that of an earlier sitting."""

    def settles(self, what: str, value: str) -> str:
        """``value``, or what an earlier sitting has settled on."""
        return value

    def restored(self) -> tuple[Any, Mapping[str, Tensor]] | None:
        """(curve, state) where an earlier sitting ended, or None."""
        return None

    def finished(self, curve: Any, state: Callable[[], Mapping[str, Tensor]], *, last: bool) -> None:
        """A step has ended, maybe the ``last``; ``state`` gives what ``restored`` is to give. May end the sitting."""


class Forgetful(Keeper):
    """Keeps nothing."""


class Callback:
    """What takes part in every step of a training, around what the optimiser makes of its gradients."""

    def begin(self, model: Any) -> None:
        """Training begins, or goes on; adapters are laid. What is done to the model here, ``end`` undoes."""

    def start(self) -> None:
        """Training begins, and doesn't go on; after ``begin``."""

    def on_gradients(self, step: int) -> None:
        """The step with this number, from 1, has its gradients: of all examples, not clipped yet."""

    def on_pre_optimizer_step(self, step: int) -> None:
        """The same, when gradients are clipped."""

    def on_optimizer_step(self, step: int) -> None:
        """The step has been taken; its gradients are still there."""

    def end(self) -> None:
        """Training has ended, well or not; adapters are still there."""

    def state(self) -> Mapping[str, Tensor]:
        """What a later sitting needs to go on to the bit."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Be what ``state`` was taken from; after ``begin``, when parameters are what they were."""


@dataclass(frozen=True)
class Pace:
    """How long a training is and how it goes; ``rate`` gives the learning rate of a step, counted from 0.

    ``batch`` are the examples of a step, of all ranks together, and ``micro`` those of one forward; 0: all of a rank's.
    ``done`` steps of the same training lie before these: data, learning rate and random numbers go on behind them.
    Gradients longer than ``clip`` are shortened to it (0: none).
    """

    steps: int
    batch: int
    rate: Rate
    micro: int = 0
    clip: float = 0.0
    seed: int = 0
    dtype: str = "float32"
    done: int = 0
    measured_every: int = 1


class Loop:
    """Trains the ``parameters`` of ``model`` in place; ``loss(model, examples, step)`` is that of some examples.

    ``examples`` are numbers below ``count``, [micro] int64, drawn without replacement until all are gone. ``what`` an
    example is called in errors. All ``ranks`` share the examples of every step; ``model`` is the same on all of them,
    or sharded over them by FSDP2. Raises UsageError.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        optimizer: Optimizer,
        loss: Callable[[Any, Tensor, int], Tensor],
        count: int,
        pace: Pace,
        *,
        device: torch.device,
        callbacks: Sequence[Callback] = (),
        ranks: Ranks = ALONE,
        what: str = "examples",
    ) -> None:
        self._model, self._parameters, self._optimizer = model, parameters, optimizer
        self._loss, self._count, self._pace, self._ranks = loss, count, pace, ranks
        self._callbacks, self._device = callbacks, device
        self._micro = pace.micro or max(1, pace.batch // ranks.size)
        if pace.batch % (self._micro * ranks.size):
            raise UsageError(
                f"batch {pace.batch} can't be shared by {ranks.size} rank{'s' if ranks.size > 1 else ''} in forwards"
                f" of {self._micro} {what}: let it be a multiple of {self._micro * ranks.size}"
            )
        self._accelerator: Any = None
        if ranks.size > 1:
            # not for one process alone: what it sets holds for the whole of a script, whose own it may contradict
            accelerate = require_extra("accelerate", "train", "training by several ranks")
            self._accelerator = accelerate.Accelerator(cpu=device.type == "cpu", mixed_precision="no")
        # ranks keep equal parameters by equal steps; the wrapper means their gradients
        self._replicated = ranks.size > 1 and not is_sharded(model)
        self._wrapped = self._accelerator.prepare(model) if self._replicated else model

    def run(
        self,
        curve: Any,
        keeper: Keeper | None = None,
        measure: Callable[[Any], None] | None = None,
        progress: Progress = lambda stage, done, total: None,
        stage: str = "train",
    ) -> Any:
        """All steps that are left; returns the curve, which is ``curve`` or the one that ``keeper`` has.

        ``measure(curve)`` notes in it what there is to be measured, before the first step, now and then, and at the
        end. Raises NonFiniteError when a loss is NaN, and what ``callbacks`` and ``keeper`` raise.
        """
        pace, keeper = self._pace, keeper or Forgetful()
        restored = keeper.restored()
        if restored is None:
            for callback in self._callbacks:
                callback.start()
            self._measure(curve, measure)
        else:
            curve = restored[0]
            self._restore(restored[1])
        with self._training():
            while curve.steps < pace.steps:
                started = time.perf_counter()
                loss = self._step(curve.steps)
                if not math.isfinite(loss):
                    raise NonFiniteError(
                        f"the loss of step {curve.steps + 1} is NaN or inf: try a lower learning rate (lr) than"
                        f" {pace.rate.peak:g}, or float32; nothing was written"
                    )
                curve.losses.append(loss)
                curve.seconds += time.perf_counter() - started
                if curve.steps % pace.measured_every == 0 or curve.steps == pace.steps:
                    self._measure(curve, measure)
                progress(stage, curve.steps, pace.steps)
                keeper.finished(curve, self._state, last=curve.steps == pace.steps)
        return curve

    def _training(self) -> ExitStack:
        stack = ExitStack()
        stack.enter_context(apart())
        self._wrapped.train()
        return stack

    def _step(self, step: int) -> float:
        """One step of the optimiser; the mean loss of its examples, over all ranks."""
        pace, ranks = self._pace, self._ranks
        # later stages go on with data, learning rate and random numbers
        step += pace.done
        mine = examples_of(step, pace.batch, self._count, pace.seed).tensor_split(ranks.size)[ranks.rank]
        parts = mine.split(self._micro)
        # of dropout: the same numbers whenever and wherever this step is done
        torch.manual_seed(step_seed(step, pace.seed) * ranks.size + ranks.rank)
        total = torch.zeros((), device=self._device)
        for place, part in enumerate(parts, start=1):
            # ranks exchange gradients once, when all of them are there; of shards every time, since no rank has room
            waits = self._replicated and place < len(parts)
            with self._accelerator.no_sync(self._wrapped) if waits else nullcontext(), self._precision():
                loss = self._loss(self._wrapped, part, step) / len(parts)
            loss.backward()
            total += loss.detach().float()
        self._tell("on_gradients", step)
        if pace.clip:
            torch.nn.utils.clip_grad_norm_(list(self._parameters.values()), pace.clip)
        self._tell("on_pre_optimizer_step", step)
        for group in self._optimizer.param_groups:
            group["lr"] = pace.rate(step)
        value = self._mean(total)
        # a step with a broken loss is not taken
        if math.isfinite(value):
            self._optimizer.step()
            self._tell("on_optimizer_step", step)
        self._optimizer.zero_grad(set_to_none=True)
        return value

    def _tell(self, what: str, step: int) -> None:
        for callback in self._callbacks:
            getattr(callback, what)(step + 1)

    def _mean(self, total: Tensor) -> float:
        if self._ranks.size == 1:
            return float(total)
        return float(self._accelerator.reduce(total, "mean"))

    def _precision(self) -> Any:
        if self._pace.dtype == "float32":
            return nullcontext()
        return torch.autocast(self._device.type, dtype=torch.bfloat16)

    def _measure(self, curve: Any, measure: Callable[[Any], None] | None) -> None:
        if measure is not None:
            measure(curve)
            self._wrapped.train()

    def _state(self) -> dict[str, Tensor]:
        """All tensors that a later sitting needs, by name; all ranks call this together."""
        found: dict[str, Tensor] = {f"{_PARAMETER}{name}": self._gathered(p) for name, p in self._parameters.items()}
        found |= {f"{_BUFFER}{name}": buffer for name, buffer in self._buffers().items()}
        for number, callback in enumerate(self._callbacks):
            found |= {f"{_CALLBACK}{number}/{name}": tensor for name, tensor in callback.state().items()}
        for name, parameter in self._parameters.items():
            for key, value in self._optimizer.state.get(parameter, {}).items():
                # SGD without momentum remembers None
                if isinstance(value, Tensor):
                    found[f"{_OPTIMIZER}{key}/{name}"] = self._gathered(value)
        return found

    def _gathered(self, tensor: Tensor) -> Tensor:
        """All of a tensor, of one that is sharded on the first rank alone, and there on the CPU."""
        if not isinstance(tensor, DTensor):
            return tensor.detach()
        gathered = whole(tensor)
        return gathered.cpu() if self._ranks.main else torch.empty(0)

    def _buffers(self) -> dict[str, Tensor]:
        """Running statistics, and whatever else a checkpoint of the model holds beside parameters."""
        own = {name for name, _ in self._model.named_buffers()}
        return {name: tensor for name, tensor in self._model.state_dict().items() if name in own}

    def _restore(self, state: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                local(parameter).copy_(local(shard_like(state[f"{_PARAMETER}{name}"], parameter)))
            for name, buffer in self._buffers().items():
                buffer.copy_(state[f"{_BUFFER}{name}"])
        for full, value in state.items():
            if full.startswith(_OPTIMIZER):
                key, _, name = full.removeprefix(_OPTIMIZER).partition("/")
                parameter = self._parameters[name]
                # counters of steps stay where optimisers make them
                there = value.clone() if value.dim() == 0 else shard_like(value, parameter).clone()
                self._optimizer.state[parameter][key] = there
        for number, callback in enumerate(self._callbacks):
            own = f"{_CALLBACK}{number}/"
            callback.restore({name.removeprefix(own): t for name, t in state.items() if name.startswith(own)})
