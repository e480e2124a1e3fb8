"""Top-1 accuracy and mean loss of classifiers on labelled images.

    accuracy = share of the images whose class has the highest score
    loss     = mean over the images of -log softmax(scores)[class], in nats

    accuracy:FOLDER                      one sub-folder of pictures per class, class indices in the order of their names
    accuracy:FILE.npz                    arrays x and y, or x_test and y_test
    accuracy:FILE.parquet                columns image and label; also a folder of such files
    accuracy:NAME                        a data set of the hub, or the folder in which ``datasets`` has saved one
    accuracy:torchvision:NAME?root=DIR   a data set of torchvision that lies in DIR
    accuracy:sklearn:digits              797 of the 1797 digits of scikit-learn; 1000 are in split=train

Settings follow a question mark, as in ``accuracy:photos?split=val&size=224&limit=1000``: split, image and label
(columns), root, size, crop, mean, std, batch, limit. Every model sees the same batches, in evaluation mode.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from secateur.errors import DataError, NonFiniteError, UsageError, first_line
from secateur.evaluation.base import Inputs, Settings
from secateur.evaluation.runners import Runner, open_runners
from secateur.finite import all_finite
from secateur.observe.images import ImageSource
from secateur.report import Metric


@dataclass
class _Tally:
    correct: int = 0
    loss: float = 0.0


@dataclass(frozen=True)
class Accuracy:
    """``accuracy:SOURCE``, see the module's docstring."""

    images: ImageSource

    @classmethod
    def parse(cls, argument: str) -> Accuracy:
        """From the text after ``accuracy:``. Raises UsageError for a missing source or a bad setting."""
        return cls(ImageSource.parse(argument, "accuracy"))

    @property
    def name(self) -> str:
        """``accuracy:`` and the source; a file or folder goes by its name."""
        return f"accuracy:{self.images.name}"

    def measure(self, models: Mapping[str, Any], tokenizer: Any, settings: Settings) -> list[Metric]:
        """Two metrics, ``accuracy:SOURCE`` (a fraction) and ``loss:SOURCE`` (nats).

        Raises UsageError for a model that doesn't take the images, DataError for unusable data or labels beyond the
        classes, NonFiniteError when scores are NaN or inf.
        """
        images = self.images.open(_image_shape(settings.inputs), settings.seed)
        runners = open_runners(models)
        tallies = {name: _Tally() for name in models}
        seen = 0
        for x, y in images:
            for name, runner in runners.items():
                _add(tallies[name], _scores(runner, x, name), y, name, self.name)
            seen += len(y)
            settings.progress(self.name, seen, images.count or seen)
        if not seen:
            raise DataError(f"{self.images.name} holds no images")
        protocol = images.protocol(seen)
        return [
            Metric(self.name, "fraction", {n: t.correct / seen for n, t in tallies.items()}, True, protocol),
            Metric(f"loss:{self.images.name}", "", {n: t.loss / seen for n, t in tallies.items()}, False, protocol),
        ]


def _image_shape(inputs: Inputs | None) -> tuple[int, ...] | None:
    """Shape of the images among the example inputs."""
    if inputs is None:
        return None
    shapes = [tuple(t.shape) for t in inputs.args if isinstance(t, Tensor)] + [tuple(s) for s in inputs.sizes.values()]
    return next((shape for shape in shapes if len(shape) == 4), None)


def _scores(runner: Runner, x: Tensor, name: str) -> Tensor:
    """Scores of the classes, [images, classes]; a network of fixed sizes gets as many images as it takes."""
    size = runner.fixed_batch or len(x)
    parts = []
    try:
        for part in x.split(size):
            filled = torch.cat([part, part.new_zeros(size - len(part), *part.shape[1:])])
            parts.append(runner.classify(filled)[: len(part)])
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        shape = "x".join(map(str, (size, *x.shape[1:])))
        raise UsageError(f"model {name} doesn't run on images of {shape}: {first_line(error)}") from None
    return torch.cat(parts)


def _add(tally: _Tally, scores: Tensor, y: Tensor, name: str, task: str) -> None:
    if not all_finite(scores):
        raise NonFiniteError(f"{task}: model {name} gives scores that are NaN or inf; try float32, or remove less")
    if int(y.max()) >= scores.shape[1]:
        raise DataError(f"{task} holds class {int(y.max())}, and model {name} tells {scores.shape[1]} classes apart")
    tally.correct += int((scores.argmax(dim=1) == y).sum())
    tally.loss += float(F.cross_entropy(scores.double(), y, reduction="sum"))
