"""An optimizer that goes on after its module was cut in place: its parameters and their state shrink with the module.

State of the shape of its parameter (momentum, second moments) loses the same slices; anything else, such as a count of
steps, stays. Where layers start anew, their state is forgotten.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.errors import UsageError
from secateur.structure.graphcut import cut_tensor
from secateur.structure.resize import Cut
from secateur.structure.trace import attribute


def check_optimizer(optimizer: Any, module: nn.Module, inplace: bool) -> None:
    """Raises UsageError for what can't follow a cut."""
    if optimizer is None:
        return
    if not inplace:
        raise UsageError("optimizer= goes with inplace=True: otherwise the module that it trains isn't the one cut")
    if not isinstance(optimizer, Optimizer):
        raise UsageError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    mine = {id(p) for p in module.parameters()}
    if not any(id(p) in mine for group in optimizer.param_groups for p in group["params"]):
        raise UsageError("the optimizer has none of the module's parameters")


def shrink_optimizer(
    optimizer: Optimizer, before: Mapping[str, Tensor], module: nn.Module, cut: Cut, *, anew: bool = False
) -> None:
    """Let an optimizer hold the parameters that took the place of those in ``before``, by name."""
    replaced: dict[int, tuple[str, nn.Parameter]] = {}
    for name, old in before.items():
        replaced.setdefault(id(old), (name, attribute(module, name)))
    for group in optimizer.param_groups:
        followed = []
        for old in group["params"]:
            name, new = replaced.get(id(old), ("", old))
            if new is not old and old in optimizer.state:
                state = optimizer.state.pop(old)
                if not anew:
                    optimizer.state[new] = {key: _cut(cut, name, old, value) for key, value in state.items()}
            followed.append(new)
        group["params"] = followed


def _cut(cut: Cut, name: str, parameter: Tensor, state: Any) -> Any:
    if not isinstance(state, Tensor) or state.shape != parameter.shape or name not in cut.trace.parameters:
        return state
    return cut_tensor(cut, cut.trace.parameters[name], state).clone()
