"""A Sparsifier within ``transformers.Trainer``.

    trainer = Trainer(model, args, train_dataset=data, callbacks=[SparsifierCallback(method="gmp", sparsity=0.5)])
    trainer.train()
    plan = trainer.callback_handler.callbacks[-1].sparsifier.plan()

Checkpoints of the trainer hold ``sparsifier.safetensors``, from which ``resume_from_checkpoint`` goes on to the bit.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from secateur.errors import UsageError
from secateur.methods import StartingMethod, get_method
from secateur.train.checkpoints import FILE
from secateur.train.sparsifier import Sparsifier


class SparsifierCallback(TrainerCallback):
    """Prunes while a Trainer trains; ``arguments`` are those of ``secateur.Sparsifier`` beside model and optimizer.

    Where a method has ``steps``, they are those of the trainer unless they are given. A method that prunes before
    training looks at the first ``start_batches`` batches of the trainer and the loss of its model, unless ``data`` is
    given. ``resume`` is the checkpoint to go on from, where the trainer found its own outside its output folder.
    """

    def __init__(self, *, start_batches: int = 1, resume: str | Path | None = None, **arguments: Any) -> None:
        self.sparsifier: Sparsifier | None = None
        self._arguments, self._start_batches, self._resume = arguments, start_batches, resume

    def on_train_begin(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        """Make the Sparsifier, and go on with the state of a checkpoint where the trainer does."""
        model, optimizer = parts["model"], parts["optimizer"]
        arguments = dict(self._arguments)
        method = get_method(arguments.get("method", "gmp"))
        if "steps" in method.option_fields():
            arguments.setdefault("steps", state.max_steps)
        if issubclass(method, StartingMethod) and "data" not in arguments and state.global_step == 0:
            arguments["data"] = list(islice(parts["train_dataloader"], self._start_batches))
            arguments.setdefault("loss", loss_of_model)
        if state.global_step:
            arguments["resume"] = self._checkpoint(args, state.global_step)
        self.sparsifier = Sparsifier(model, optimizer, **arguments)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        """Behind the optimizer and before gradients go."""
        self._made().step()

    def on_save(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        """Put the state into the checkpoint that the trainer has written."""
        # of sharded weights every rank has its part
        if state.is_world_process_zero or self._made().sharded:
            self._made().save(Path(args.output_dir) / f"checkpoint-{state.global_step}" / FILE)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **parts: Any) -> None:
        """Sparsity beside the loss."""
        if logs is not None and self.sparsifier is not None:
            logs["sparsity"] = self.sparsifier.sparsity
            # the history has its own copy
            state.log_history[-1]["sparsity"] = self.sparsifier.sparsity

    def on_train_end(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        """Let go of the optimizer; ``sparsifier.plan()`` still gives the masks."""
        self._made().finish()

    def _made(self) -> Sparsifier:
        if self.sparsifier is None:
            raise UsageError("the trainer hasn't begun: the Sparsifier is made when it does")
        return self.sparsifier

    def _checkpoint(self, args: Any, step: int) -> Path:
        folders = [Path(p) for p in (self._resume, args.resume_from_checkpoint) if isinstance(p, str | Path)]
        folders.append(Path(args.output_dir) / f"checkpoint-{step}")
        found = next((folder / FILE for folder in folders if (folder / FILE).is_file()), None)
        if found is None:
            raise UsageError(
                f"the training goes on at step {step}, but {folders[-1].name} of the output folder holds no {FILE}: say"
                " where the checkpoint is with SparsifierCallback(resume=FOLDER)"
            )
        return found


def loss_of_model(module: Any, batch: Any) -> Any:
    """The loss that a model of transformers computes by itself."""
    import torch

    device = next(module.parameters()).device
    moved = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    return module(**moved).loss
