"""The contract of an evaluation, and what all evaluations share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch import Tensor

from secateur.errors import UsageError, nearest
from secateur.report import Metric

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Progress = Callable[[str, int, int], None]


def silent(stage: str, done: int, total: int) -> None:
    """A progress callback that shows nothing."""


@dataclass(frozen=True)
class Inputs:
    """What networks are called with: tensors in order and by name, or the sizes of an ONNX model's inputs by name."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    sizes: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def __str__(self) -> str:
        """``2x3x32x32`` of every tensor, for protocols."""
        tensors = [t.shape for t in (*self.args, *self.kwargs.values()) if isinstance(t, Tensor)]
        return ", ".join("x".join(map(str, shape)) for shape in (*tensors, *self.sizes.values()))


@dataclass(frozen=True)
class Settings:
    """What all evaluations of one call have in common.

    ``length`` is the window in tokens and ``windows`` their number; ``folders`` maps a model's name to the checkpoint
    folder that it was loaded from, where there is one; ``inputs`` is what networks are called with, and None for
    decoders; ``progress`` is called with (stage, done, total).
    """

    length: int = 512
    windows: int = 40
    seed: int = 0
    text_field: str | None = None
    folders: Mapping[str, Path] = field(default_factory=dict)
    inputs: Inputs | None = None
    progress: Progress = silent
    tokenizers: Mapping[str, PreTrainedTokenizerBase] = field(default_factory=dict)
    """Those of models that have another one than the dense model."""


@runtime_checkable
class Evaluation(Protocol):
    """Something that is measured on several models at once, the dense baseline first.

    Law: measuring leaves the models, their mode and the global random state as they were.
    """

    @property
    def name(self) -> str:
        """The task as the user wrote it."""
        ...

    def measure(
        self, models: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None, settings: Settings
    ) -> list[Metric]:
        """One or several metrics, each with a value for every model."""
        ...


@runtime_checkable
class Checked(Protocol):
    """An evaluation that can tell beforehand what would keep it from measuring."""

    def check(self, model: Any, tokenizer: PreTrainedTokenizerBase | None, settings: Settings) -> None:
        """Read what ``model``, which may lie on the meta device, would be measured on. Raises what that raises."""
        ...


def is_decoder(model: Any) -> bool:
    """Whether this is a model of transformers that reads text, and not one that is known by its example inputs."""
    return hasattr(getattr(model, "config", None), "get_text_config")


def whole_numbers(what: str, argument: str, known: Sequence[str]) -> dict[str, int]:
    """``{"batch": 2}`` of ``batch=2``. Raises UsageError for a key that isn't ``known`` or a number below 1."""
    found = {}
    for part in filter(None, argument.split(",")):
        key, _, value = part.partition("=")
        if key not in known:
            raise UsageError(f"{what} has no setting '{key}'{nearest(key, known)} (it has {', '.join(known)})")
        if not value.isdecimal() or int(value) < 1:
            raise UsageError(f"{what}: {key} must be a whole number of at least 1, got {value!r}")
        found[key] = int(value)
    return found
