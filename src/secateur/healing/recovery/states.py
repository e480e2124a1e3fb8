"""What a frozen teacher makes of a batch, kept for when it comes again: models that are trained alike see the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from secateur.healing.recovery.forwards import instead

MOST_BYTES = 1 << 30


class FinalStates:
    """States before the head of one frozen model, by batch, on the CPU; ``most_bytes`` of them at most.

    A head turns them into predictions at a fraction of what the blocks below it take. Batches are kept and not their
    windows, since a window's states differ by rounding with those beside it, and a run that is resumed would, too.
    """

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._kept: dict[tuple[Any, ...], tuple[type, Tensor]] = {}
        self._room = most_bytes

    def logits(self, model: nn.Module, ids_BT: Tensor) -> Tensor:
        """Logits [B, T, V] of ``model``, to the bit as without memory; ``ids_BT`` int64."""
        # as transformers calls what a head reads
        below: Any = getattr(model, "get_decoder", lambda: model)()
        device = ids_BT.device.type
        precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        key = (precision, ids_BT.shape, ids_BT.cpu().numpy().tobytes())
        if key in self._kept:
            form, state = self._kept[key]
            answer = form(last_hidden_state=state.to(ids_BT.device))
            with instead(below, lambda *_, **__: answer):
                return model(input_ids=ids_BT, use_cache=False).logits
        with _heard(below) as said:
            logits = model(input_ids=ids_BT, use_cache=False).logits
        for output in said:
            state = getattr(output, "last_hidden_state", None)
            if state is not None and state.nbytes <= self._room:
                self._room -= state.nbytes
                self._kept[key] = type(output), state.detach().cpu()
        return logits


@contextmanager
def _heard(below: nn.Module) -> Iterator[list[Any]]:
    """What ``below`` says within the block; nothing where the model doesn't ask it as a whole."""
    said: list[Any] = []
    handle = below.register_forward_hook(lambda _module, _args, output: said.append(output))
    try:
        yield said
    finally:
        handle.remove()
