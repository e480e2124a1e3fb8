"""A Sparsifier within Lightning (extra ``lightning``).

    trainer = lightning.Trainer(max_steps=1000, callbacks=[lightning_callback(method="gmp", sparsity=0.9, end=800)])

Checkpoints of the trainer hold its state, from which ``ckpt_path`` goes on to the bit.
"""

from __future__ import annotations

from typing import Any

from secateur.errors import UsageError, require_extra
from secateur.methods import get_method
from secateur.train.sparsifier import Sparsifier


def lightning_callback(**arguments: Any) -> Any:
    """A callback for ``lightning.Trainer`` with the arguments of ``secateur.Sparsifier`` beside model and optimizer.

    Its ``sparsifier`` is made when the training begins; ``steps`` are those of the trainer unless they are given.
    Raises MissingExtraError.
    """
    lightning = require_extra("lightning", "lightning", "pruning while Lightning trains")

    class SparsifierCallback(lightning.Callback):
        """Steps behind the optimizer, when Lightning is about to let gradients go."""

        def __init__(self) -> None:
            self.sparsifier: Sparsifier | None = None
            self._state: dict[str, Any] | None = None

        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            if len(trainer.optimizers) != 1:
                raise UsageError(f"a Sparsifier follows one optimizer, and this module has {len(trainer.optimizers)}")

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            given = dict(arguments)
            if "steps" in get_method(given.get("method", "gmp")).option_fields():
                given.setdefault("steps", int(trainer.estimated_stepping_batches))
            self.sparsifier = Sparsifier(pl_module, trainer.optimizers[0], resume=self._state, **given)

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            # nothing happens where the optimizer hasn't stepped
            assert self.sparsifier is not None
            self.sparsifier.step()

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            assert self.sparsifier is not None
            self.sparsifier.finish()

        def state_dict(self) -> dict[str, Any]:
            return self.sparsifier.state_dict() if self.sparsifier is not None else {}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self._state = state_dict

    return SparsifierCallback()
