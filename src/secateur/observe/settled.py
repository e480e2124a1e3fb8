"""Parts of a block that won't change any more, and what they gave to every batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from secateur.observe.activations import Activations


class Settled:
    """A module of a block whose weights and inputs are final: what it gives is computed once, and given again.

    Its output is a tensor, or a tuple of a tensor and nothing else; one that gives more is computed every time.
    ``outputs`` are empty ones, and hold as much as hidden states do.
    """

    def __init__(self, module: nn.Module, outputs: Activations) -> None:
        self._module, self._outputs = module, outputs
        # how many things its tuple holds; 0: a tensor alone
        self._length = 0

    @contextmanager
    def in_batch(self, batch: int) -> Iterator[None]:
        """Within one forward of the block on this batch; batches come in their order."""
        if batch < len(self._outputs):
            self._module.forward = lambda *args, **kwargs: self._given(batch)
            try:
                yield
            finally:
                self._module.__dict__.pop("forward", None)
            return
        handle = self._module.register_forward_hook(lambda module, args, output: self._keep(batch, output))
        try:
            yield
        finally:
            handle.remove()

    def _keep(self, batch: int, output: Any) -> None:
        parts = output if isinstance(output, tuple) else (output,)
        if batch == len(self._outputs) and isinstance(parts[0], Tensor) and all(part is None for part in parts[1:]):
            self._length = len(parts) if isinstance(output, tuple) else 0
            self._outputs.append(parts[0])

    def _given(self, batch: int) -> Any:
        output = self._outputs[batch]
        return (output, *[None] * (self._length - 1)) if self._length else output
