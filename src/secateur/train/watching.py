"""An optimizer that is watched: whether it has taken its step, on what gradients, and what it remembers of weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.errors import UsageError
from secateur.rowmasks import clear_dead


class Watched:
    """Hooks on an optimizer, until ``release``.

    ``keeping`` says before a step whether it may have to be taken back, ``looking`` whether its gradients are wanted.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        weights: Iterable[Tensor],
        keeping: Callable[[], bool],
        looking: Callable[[], bool],
    ) -> None:
        # Accelerate wraps optimizers
        self.optimizer: Optimizer = getattr(optimizer, "optimizer", optimizer)
        if not isinstance(self.optimizer, Optimizer):
            raise UsageError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        self._weights = list(weights)
        own = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        if not any(id(weight) in own for weight in self._weights):
            raise UsageError(
                "the optimizer holds none of the weights that are pruned: make it of the parameters of this model,"
                " after anything that replaces them"
            )
        self._keeping, self._looking = keeping, looking
        self._stepped = False
        self._before: dict[nn.Parameter, tuple[Tensor, dict[str, Any]]] = {}
        self._gradients: dict[int, Tensor] = {}
        self._hooks = [
            self.optimizer.register_step_pre_hook(self._pre),
            self.optimizer.register_step_post_hook(self._post),
        ]

    def taken(self) -> bool:
        """Whether a step was taken since this was asked last: not in between accumulated batches, nor where a
        gradient scaler has left it out."""
        stepped, self._stepped = self._stepped, False
        return stepped

    def gradient(self, weight: Tensor) -> Tensor | None:
        """What the last step was taken on, dense; also when the weight has no gradient any more."""
        return self._gradients.get(id(weight), weight.grad)

    def take_back(self) -> None:
        """Bring parameters and state back to what they were before the step that was taken."""
        for parameter, (value, state) in self._before.items():
            parameter.data.copy_(value)
            if state:
                self.optimizer.state[parameter] = state
            else:
                self.optimizer.state.pop(parameter, None)
        self._before = {}

    def mask(self, weight: Tensor, mask: Tensor) -> None:
        """Zero what the optimizer remembers of dead entries."""
        mask_state(self.optimizer, weight, mask)

    def forget(self) -> None:
        """Let gradients and copies go."""
        self._gradients, self._before = {}, {}

    def release(self) -> None:
        """Take the hooks off."""
        self.forget()
        for hook in self._hooks:
            hook.remove()

    def _pre(self, *_: Any) -> None:
        if self._keeping():
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            self._before = {p: (p.detach().clone(), _copied(self.optimizer.state.get(p, {}))) for p in parameters}

    def _post(self, *_: Any) -> None:
        # a fused optimizer under a gradient scaler is told of inf, and leaves out the step by itself
        broken = getattr(self.optimizer, "found_inf", None)
        if broken is not None and float(broken):
            self._before = {}
            return
        self._stepped = True
        if self._looking():
            # zero_grad(set_to_none=False) would zero them where they are
            self._gradients = {id(w): w.grad.detach().clone() for w in self._weights if w.grad is not None}


def mask_state(optimizer: Optimizer, weight: Tensor, mask: Tensor) -> None:
    """Zero what an optimizer remembers of dead entries: every state that has an entry for each of the weight's.

    Of a weight that is sharded over ranks, ``mask`` is this rank's part.
    """
    for value in _tensors(optimizer.state.get(weight, {})):
        if value.shape == weight.shape and value.is_floating_point():
            clear_dead(value, mask)


def _tensors(state: Any) -> Iterator[Tensor]:
    """The tensors of a state, also those that lie in lists and dicts of it."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, dict | list):
        for value in state.values() if isinstance(state, dict) else state:
            yield from _tensors(value)


def _copied(state: Any) -> Any:
    """A copy of a state, also of what lies in lists and dicts of it, as the history of L-BFGS does."""
    if isinstance(state, Tensor):
        return state.detach().clone()
    if isinstance(state, dict):
        return {key: _copied(value) for key, value in state.items()}
    if isinstance(state, list):
        return [_copied(value) for value in state]
    return state


def mean_over_ranks(tensor: Tensor, group: Any = None) -> Tensor:
    """The mean over the ranks of data parallelism, the same bits on every rank; the tensor itself in one process."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total, group=group)
    return total / dist.get_world_size(group)
