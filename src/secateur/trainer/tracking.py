"""TensorBoard and Weights & Biases, through Accelerate: loss, learning rate, sparsity, what is measured."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from secateur.errors import MissingExtraError, require_extra
from secateur.loop import Rate
from secateur.trainer.curve import TrainingCurve


def check_trackers(names: Sequence[str]) -> None:
    """Raises MissingExtraError for one that isn't installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise MissingExtraError(
                f"track: {name} is not installed: pip install {name}, or leave it out of the recipe"
            )


@contextmanager
def tracking(
    names: Sequence[str], run: str, folder: Path, config: dict[str, Any], rate: Rate
) -> Iterator[Callable[[TrainingCurve], None]]:
    """What is to be called after every step; ``folder`` is where TensorBoard finds its files."""
    if not names:
        yield lambda curve: None
        return
    require_extra("accelerate", "train", "tracking")
    from accelerate import tracking as accelerate

    kinds: dict[str, Callable[[], Any]] = {
        "tensorboard": lambda: accelerate.TensorBoardTracker(run, logging_dir=str(folder)),
        "wandb": lambda: accelerate.WandBTracker(run, config=config),
    }
    trackers = [kinds[name]() for name in names]
    for tracker in trackers:
        # trackers whose start is put off by newer versions of Accelerate
        if hasattr(tracker, "start"):
            tracker.start()
    told = 0

    def watch(curve: TrainingCurve) -> None:
        nonlocal told
        values = {"loss": curve.losses[-1], "learning rate": rate(curve.steps - 1)}
        if curve.sparsities:
            values["sparsity"] = curve.sparsities[-1]
        for step, numbers in curve.measured[told:]:
            # W&B takes steps in their order only, and a training that was resumed has told what was before
            for tracker in trackers if step == curve.steps or step == curve.steps - 1 == 0 else ():
                tracker.log({f"test {name}": value for name, value in numbers.items()}, step=step)
        told = len(curve.measured)
        for tracker in trackers:
            tracker.log(values, step=curve.steps)

    try:
        yield watch
    finally:
        for tracker in trackers:
            tracker.finish()
