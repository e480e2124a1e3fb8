"""What is trained on and measured on: pictures with labels, or windows of a text.

B examples of a batch, C channels, T tokens.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from secateur.errors import DataError, NonFiniteError, UsageError, first_line
from secateur.evaluation.perplexity import window_losses
from secateur.evaluation.runners import scores_of
from secateur.finite import all_finite
from secateur.observe.calibration import load_tokens
from secateur.observe.images import ImageSource
from secateur.trainer.recipe import DataSpec, TrainRecipe

# images of one forward where nothing is trained
_MEASURED_AT_ONCE = 256


class Examples(Protocol):
    """What a training reads; examples are called by their numbers, from 0 to ``count`` - 1."""

    what: str
    quality: str
    """the measured number that counts"""

    @property
    def count(self) -> int: ...

    def loss(self, model: Any, numbers: Tensor, step: int) -> Tensor:
        """Mean loss of these examples, a scalar, as they are seen in this step."""
        ...

    def measure(self, model: Any) -> dict[str, float]:
        """Numbers by name on what isn't trained on, the model in evaluation mode."""
        ...

    def inputs(self, numbers: Tensor) -> Any:
        """What the model is called with on these examples, as training sees them, on the CPU."""
        ...

    def outputs(self, model: Any) -> Tensor:
        """What the model gives on some of what is measured on, on the CPU."""
        ...

    def first_look(self, numbers: Tensor) -> dict[str, Any]:
        """What a Sparsifier is told that prunes before training, with these examples."""
        ...

    def example(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) with which the model is called on one example."""
        ...

    @property
    def protocol(self) -> str:
        """What is measured on."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hash of everything that is trained on."""
        ...


@dataclass
class Pictures:
    """Labelled pictures in memory: ``x`` [number, C, height, width] float32 and ``y`` [number] int64 on the CPU."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor
    protocol: str
    augment: tuple[str, ...] = ()
    smoothing: float = 0.0
    device: str = "cpu"
    what: str = field(default="images", init=False)
    quality: str = field(default="accuracy", init=False)

    @property
    def count(self) -> int:
        return len(self.y)

    def loss(self, model: Any, numbers: Tensor, step: int) -> Tensor:
        x = self.inputs(numbers).to(self.device)
        return self._loss(model, x, self.y[numbers].to(self.device))

    def _loss(self, model: Any, x: Tensor, y: Tensor) -> Tensor:
        scores = _scores(model, x)
        if int(y.max()) >= scores.shape[1]:
            raise DataError(f"the pictures hold class {int(y.max())}, and the network tells {scores.shape[1]} apart")
        return F.cross_entropy(scores.float(), y, label_smoothing=self.smoothing)

    def inputs(self, numbers: Tensor) -> Tensor:
        return self._augmented(self.x[numbers])

    def outputs(self, model: Any) -> Tensor:
        return _scores(model, self.x_test[:_MEASURED_AT_ONCE].to(self.device)).cpu()

    def _augmented(self, x_BCHW: Tensor) -> Tensor:
        """Drawn by the random numbers of the step, which follow from its number."""
        for word in self.augment:
            name, _, pixels = word.partition("=")
            x_BCHW = _flipped(x_BCHW) if name == "flip" else _cropped(x_BCHW, int(pixels))
        return x_BCHW

    @torch.no_grad()
    def measure(self, model: Any) -> dict[str, float]:
        model.eval()
        correct, loss = 0, 0.0
        for x, y in zip(self.x_test.split(_MEASURED_AT_ONCE), self.y_test.split(_MEASURED_AT_ONCE), strict=True):
            scores = _scores(model, x.to(self.device)).cpu()
            if not all_finite(scores):
                raise NonFiniteError("the network gives scores that are NaN or inf on the test images")
            if int(y.max()) >= scores.shape[1]:
                raise DataError(f"the test images hold class {int(y.max())}, and the network tells {scores.shape[1]}")
            correct += int((scores.argmax(dim=1) == y).sum())
            loss += float(F.cross_entropy(scores.double(), y, reduction="sum"))
        return {"accuracy": correct / len(self.y_test), "loss": loss / len(self.y_test)}

    def first_look(self, numbers: Tensor) -> dict[str, Any]:
        x, y = self.x[numbers].to(self.device), self.y[numbers].to(self.device)
        # logits of a transformers model are in an attribute
        return {
            "data": [(x, y)],
            "loss": lambda module, batch: self._loss(module, *batch),
            "example_inputs": (x[:1],),
        }

    def example(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (self.x[:1].to(self.device),), {}

    @property
    def fingerprint(self) -> str:
        return _hash(self.x, self.y)


@dataclass
class Texts:
    """Windows of token ids on the CPU, ``ids_NT`` to train on and ``test_NT`` to measure on, int64."""

    ids_NT: Tensor
    test_NT: Tensor
    protocol: str
    what: str = field(default="windows", init=False)
    quality: str = field(default="perplexity", init=False)

    @property
    def count(self) -> int:
        return len(self.ids_NT)

    def loss(self, model: Any, numbers: Tensor, step: int) -> Tensor:
        ids_BT = self.ids_NT[numbers].to(next(model.parameters()).device)
        logits_BTV = model(input_ids=ids_BT, use_cache=False).logits[:, :-1]
        # of torch, since grasp differentiates it twice
        return F.cross_entropy(logits_BTV.flatten(0, 1).float(), ids_BT[:, 1:].flatten())

    def measure(self, model: Any) -> dict[str, float]:
        loss = float(window_losses(model, self.test_NT).mean())
        if not loss < 700:
            raise NonFiniteError(f"the loss on the text that is measured is {loss:g}: the model is broken")
        return {"perplexity": math.exp(loss), "loss": loss}

    def inputs(self, numbers: Tensor) -> dict[str, Tensor]:
        return {"input_ids": self.ids_NT[numbers]}

    def outputs(self, model: Any) -> Tensor:
        ids_NT = self.test_NT[:1].to(next(model.parameters()).device)
        return model(input_ids=ids_NT, use_cache=False).logits.cpu()

    def first_look(self, numbers: Tensor) -> dict[str, Any]:
        return {
            "data": [numbers],
            "loss": lambda module, batch: self.loss(module, batch, 0),
            "example_kwargs": self.example()[1],
        }

    def example(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (), {"input_ids": self.ids_NT[:1], "use_cache": False}

    @property
    def fingerprint(self) -> str:
        return _hash(self.ids_NT)


def load_examples(recipe: TrainRecipe, model: Any, tokenizer: Any) -> Examples:
    """What the recipe names. Raises UsageError, DataError or MissingExtraError."""
    return _texts(recipe, model, tokenizer) if recipe.data.text is not None else _pictures(recipe)


def _pictures(recipe: TrainRecipe) -> Pictures:
    data = recipe.data
    (x, y, _), (x_test, y_test, protocol) = (_read(source, recipe.seed) for source in (data.images, data.test))
    if x.shape[1:] != x_test.shape[1:]:
        raise DataError(
            f"images to train on are {'x'.join(map(str, x.shape[1:]))} and those of test"
            f" {'x'.join(map(str, x_test.shape[1:]))}: say one size for both with ?size=32"
        )
    return Pictures(x, y, x_test, y_test, protocol, tuple(data.augment), recipe.smoothing, recipe.device)


def _read(source: str | None, seed: int) -> tuple[Tensor, Tensor, str]:
    assert source is not None
    opened = ImageSource.parse(source, "data").open(seed=seed)
    batches = list(opened)
    if not batches:
        raise DataError(f"{opened.name} holds no images")
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return x, y, opened.protocol(len(y))


def _texts(recipe: TrainRecipe, model: Any, tokenizer: Any) -> Texts:
    data = recipe.data
    text = str(data.text)
    # by epochs all of the text is read
    wanted = 10**9 if recipe.steps is None else recipe.steps * recipe.batch
    held = 0 if data.test else data.windows
    ids_NT, said = _windows(data, text, tokenizer, model, min(wanted, _most(recipe)) + held, "calibration", recipe.seed)
    if data.test:
        test_NT, said = _windows(data, data.test, tokenizer, model, data.windows, "evaluation", recipe.seed)
        return Texts(ids_NT, test_NT, said)
    if len(ids_NT) < 2:
        raise DataError(f"{text} gives one window of {data.length} tokens, and one more has to be held out")
    held = min(held, max(1, len(ids_NT) // 5))
    return Texts(ids_NT[:-held], ids_NT[-held:], f"{said}; the last windows, which were not trained on")


def _most(recipe: TrainRecipe) -> int:
    """Windows that fit into a memory of 8 GB, more than a small trainer is for."""
    return 10**9 // recipe.data.length


def _windows(
    data: DataSpec, source: str, tokenizer: Any, model: Any, samples: int, split: str, seed: int
) -> tuple[Tensor, str]:
    tokens = load_tokens(
        source,
        tokenizer,
        samples=samples,
        length=data.length,
        seed=seed,
        split=split,
        text_field=data.text_field,
        model=model,
        allow_fewer=True,
    )
    return tokens.ids, f"{tokens.info.source}; {tokens.info.samples} windows of {data.length} tokens"


def _scores(model: Any, x: Tensor) -> Tensor:
    try:
        return scores_of(model(x))
    except UsageError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        shape = "x".join(map(str, x.shape))
        raise UsageError(f"the network doesn't run on images of {shape}: {first_line(error)}") from None


def _flipped(x_BCHW: Tensor) -> Tensor:
    flips = torch.rand(len(x_BCHW)) < 0.5
    return torch.where(flips[:, None, None, None], x_BCHW.flip(-1), x_BCHW)


def _cropped(x_BCHW: Tensor, pixels: int) -> Tensor:
    """Shifted by up to so many pixels in both directions; what comes in is zero."""
    height, width = x_BCHW.shape[-2:]
    padded = F.pad(x_BCHW, (pixels,) * 4)
    tops, lefts = torch.randint(0, 2 * pixels + 1, (2, len(x_BCHW))).tolist()
    return torch.stack(
        [x[:, top : top + height, left : left + width] for x, top, left in zip(padded, tops, lefts, strict=True)]
    )


def _hash(*tensors: Tensor) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()
