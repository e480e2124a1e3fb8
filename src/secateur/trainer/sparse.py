"""A Sparsifier within a training: it is made when training begins, and its state is kept with that of the training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.loop import Callback
from secateur.train.checkpoints import as_tensors, of_tensors
from secateur.train.sparsifier import Sparsifier


class Sparse(Callback):
    """``arguments`` are those of a Sparsifier; ``first_look`` gives what it is told when training begins."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        arguments: Mapping[str, Any],
        first_look: Callable[[], Mapping[str, Any]],
    ) -> None:
        self._model, self._optimizer = model, optimizer
        self._arguments, self._first_look = arguments, first_look
        self.made: Sparsifier | None = None

    @property
    def sparsifier(self) -> Sparsifier:
        """The one that was made; after ``start`` or ``restore``."""
        assert self.made is not None
        return self.made

    def start(self) -> None:
        """Masks before the first step."""
        self.made = Sparsifier(self._model, self._optimizer, **self._arguments, **self._first_look())

    def on_gradients(self, step: int) -> None:
        """See ``Callback``."""
        self.sparsifier.mask_gradients()

    def on_optimizer_step(self, step: int) -> None:
        """See ``Callback``."""
        self.sparsifier.step()

    def state(self) -> Mapping[str, Tensor]:
        """See ``Callback``."""
        return as_tensors(self.sparsifier.state_dict())

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """See ``Callback``."""
        self.made = Sparsifier(self._model, self._optimizer, resume=of_tensors(state), **self._arguments)

    def end(self) -> None:
        """Let go of the optimizer."""
        if self.made is not None:
            self.made.finish()
