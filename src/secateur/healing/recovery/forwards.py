"""Forwards of modules that are other ones for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@contextmanager
def instead(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within the block ``module`` answers with ``forward``."""
    own = vars(module).get("forward")
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.forward
        # libraries that place models on devices wrap the forward of an instance
        if own is not None:
            module.forward = own  # type: ignore[method-assign]


@contextmanager
def cast_once(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within the block the linear ones of these that aren't trained keep what autocast makes of their weights.

    Autocast itself remembers trained weights alone, and casts the others in every forward. The outputs are the same to
    the bit, and without autocast nothing is kept.
    """
    with ExitStack() as stack:
        for module in modules:
            if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
                continue
            if "forward" not in vars(module) and not module.weight.requires_grad:
                stack.enter_context(instead(module, _Remembered(module)))
        yield


class _Remembered:
    """The forward of a linear layer that casts its weight anew only when that is another one."""

    def __init__(self, layer: nn.Linear) -> None:
        self._layer = layer
        self._known: tuple[tuple[int, int, torch.dtype], Tensor] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        weight, bias, kind = self._layer.weight, self._layer.bias, x.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            now = (weight.data_ptr(), weight._version, dtype)
            if self._known is None or self._known[0] != now:
                self._known = now, weight.detach().to(dtype)
            weight = self._known[1]
        return F.linear(x, weight, bias)
