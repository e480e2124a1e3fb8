"""What a training recipe says.

    model: resnet20
    data: {images: "cifar10?split=train&size=32", test: "cifar10?split=test&size=32", augment: [flip, crop=4]}
    epochs: 30
    batch: 128
    optimizer: {name: sgd, lr: 0.1, momentum: 0.9, weight_decay: 1e-4}
    schedule: {shape: cosine, warmup: 0.05}
    sparsifier: {method: gmp, sparsity: 0.9, every: 50}
    out: sparse

``docs/guides/train-sparse.md`` explains every key. Nothing is loaded before all of it is valid.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from secateur.errors import RecipeError, UsageError, first_line, nearest
from secateur.loop import SHAPES, Rate
from secateur.methods import TrainingMethod
from secateur.recipes import Section, explain, read_recipe
from secateur.train.channels import check_method
from secateur.train.sparsifier import training_method
from secateur.usercode import check_trusted, is_reference

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
}
TRACKERS = ("tensorboard", "wandb")
NETWORKS = ("perceptron", "resnet20")
"""networks that the trainer makes itself"""
TIMM = "timm:"
# options by which timm and transformers are led to files and code beside the weights that a name stands for
_LEADING = {"checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "trust_remote_code", "code_revision"}
_LEADING |= {"use_kernels", "adapter_kwargs", "attn_implementation", "experts_implementation", "auto_map"}
_AUGMENTATION = re.compile(r"flip|crop=[1-9]\d*")


class Open(Section):
    """Keys that aren't ours are options of what is named."""

    model_config = ConfigDict(extra="allow")

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class ModelSpec(Section):
    """What is trained; ``options`` are arguments of what makes it. By default language models start pretrained."""

    name: str
    start: Literal["pretrained", "random"] | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    tokenizer: str | None = None

    @property
    def factory(self) -> str:
        """The object of Python that makes the network, as ``package.module:name``; empty where a name does."""
        named = self.name in NETWORKS or self.name.startswith(TIMM)
        return "" if named or not is_reference(self.name) else self.name

    def code(self) -> list[str]:
        """Code that would run because of this name and these options."""
        if self.name in NETWORKS:
            return []
        leading = [f"model.options.{key}: {self.options[key]}" for key in sorted(_LEADING & set(self.options))]
        return [*([f"model: {self.factory}"] if self.factory else []), *leading]


class DataSpec(Section):
    """``images`` or ``text`` to train on, and ``test``; without it the last windows of a text are held out."""

    images: str | None = None
    text: str | None = None
    test: str | None = None
    augment: list[str] = Field(default_factory=list)
    length: int = Field(default=256, ge=2)
    windows: int = Field(default=40, ge=1)
    text_field: str | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> DataSpec:
        if (self.images is None) == (self.text is None):
            raise ValueError("give images or text, one of them")
        if self.images is not None and self.test is None:
            raise ValueError("pictures need test, what is measured on: as in test: FOLDER?split=val")
        if self.text is not None and self.augment:
            raise ValueError("augment is for images")
        for word in self.augment:
            if not _AUGMENTATION.fullmatch(word):
                raise ValueError(f"augment takes flip and crop=PIXELS, got '{word}'")
        return self


class OptimizerSpec(Open):
    """An optimizer of torch by its name; every other key is its own."""

    name: Literal["sgd", "adam", "adamw", "rmsprop", "adagrad"] = "sgd"
    lr: float = Field(default=0.1, gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _known(self) -> OptimizerSpec:
        known = inspect.signature(OPTIMIZERS[self.name]).parameters
        for key in self.options:
            if key not in known or key in ("params", "lr", "name"):
                raise ValueError(f"{self.name} has no option '{key}'{nearest(key, known)}")
        try:
            self.made([torch.nn.Parameter(torch.zeros(1))])
        except Exception as error:  # whatever torch stumbles over: some values are checked, others used unseen
            raise ValueError(f"{self.name} can't be made with {self.options}: {first_line(error)}") from None
        return self

    def made(self, parameters: Any) -> torch.optim.Optimizer:
        """The optimizer of these parameters. Raises what torch raises for values that it doesn't take."""
        options = {key: tuple(value) if isinstance(value, list) else value for key, value in self.options.items()}
        return OPTIMIZERS[self.name](parameters, lr=self.lr, **options)


class ScheduleSpec(Section):
    """The learning rate by step; fractions are of all steps, see ``loop.rates``."""

    shape: Literal["cosine", "linear", "constant", "steps", "wsd"] = "constant"
    warmup: float = Field(default=0.0, ge=0, le=1)
    cooldown: float = Field(default=0.1, ge=0, le=1)
    floor: float = Field(default=0.0, ge=0, le=1)
    milestones: list[float] = Field(default_factory=list)
    gamma: float = Field(default=0.1, gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _milestones(self) -> ScheduleSpec:
        if (self.shape == "steps") != bool(self.milestones):
            raise ValueError("milestones are for the shape steps, which needs them: fractions of the training")
        if any(not 0 < milestone < 1 for milestone in self.milestones):
            raise ValueError("milestones are fractions of the training, between 0 and 1")
        return self


class SparsifierSpec(Open):
    """A method that prunes while training or before; every other key is its own. Channels are cut in the end."""

    method: str
    units: Literal["weights", "channels"] = "weights"
    include: list[str] = Field(default_factory=list)
    exclude: list[str] = Field(default_factory=list)
    cut: bool = True

    @model_validator(mode="after")
    def _cuts(self) -> SparsifierSpec:
        if "cut" in self.model_fields_set and self.units == "weights":
            raise ValueError("cut is for units: channels, which leave a smaller network: single weights stay as zeros")
        return self

    @property
    def cuts(self) -> bool:
        """Whether the trained network is cut."""
        return self.cut and self.units == "channels"

    def made(self, steps: int, seed: int) -> TrainingMethod:
        """The method; it knows the length and the seed of the training. Raises UsageError."""
        method = training_method(self.method, self.all_options(steps, seed))
        if self.units == "channels":
            check_method(method, self.include)
        return method

    def all_options(self, steps: int, seed: int) -> dict[str, Any]:
        """The options as the method takes them."""
        from secateur.methods import get_method

        known = get_method(self.method).option_fields()
        told = {key: value for key, value in {"steps": steps, "seed": seed}.items() if key in known}
        return {**told, **self.options}


class TrainRecipe(Section):
    """A whole training."""

    model: ModelSpec
    data: DataSpec
    steps: int | None = Field(default=None, ge=1)
    epochs: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    batch: int = Field(default=64, ge=1)
    micro: int = Field(default=0, ge=0)
    optimizer: OptimizerSpec = Field(default_factory=OptimizerSpec)
    schedule: ScheduleSpec = Field(default_factory=ScheduleSpec)
    sparsifier: SparsifierSpec | None = None
    clip: float = Field(default=0.0, ge=0)
    smoothing: float = Field(default=0.0, ge=0, lt=1)
    measure: int | None = Field(default=None, ge=1)
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str = "cpu"
    seed: int = Field(default=0, ge=0)
    track: list[Literal["tensorboard", "wandb"]] = Field(default_factory=list)
    format: Literal["dense", "packed"] = "dense"
    out: str | None = None

    @field_validator("model", "optimizer", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("schedule", mode="before")
    @classmethod
    def _by_shape(cls, value: Any) -> Any:
        return {"shape": value} if isinstance(value, str) else value

    @field_validator("sparsifier", mode="before")
    @classmethod
    def _by_method(cls, value: Any) -> Any:
        return {"method": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _agree(self) -> TrainRecipe:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give the length of the training by steps or by epochs, one of them")
        if self.format == "packed" and self.data.text is None:
            raise ValueError("packed checkpoints are those of language models: other networks are saved with zeros")
        if self.sparsifier is not None and self.sparsifier.units == "channels" and self.data.text is not None:
            raise ValueError(
                "channels are those of networks for images: of a language model, single weights leave in a training,"
                " and 'secateur prune' cuts heads and neurons, after which 'secateur heal' trains"
            )
        if self.smoothing and self.data.text is not None:
            raise ValueError("smoothing is of the labels of images")
        return self

    def length(self, examples: int) -> int:
        """How many steps the training has, of so many examples."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return max(1, math.ceil(self.epochs * examples / self.batch))

    def measured_every(self, steps: int) -> int:
        """Steps between two measurements; a tenth of all unless it is said."""
        return self.measure or max(1, steps // 10)

    def rate(self, steps: int) -> Rate:
        """The learning rate of a training of so many steps."""
        given = self.schedule
        return Rate(
            self.optimizer.lr,
            steps,
            given.shape,
            warmup=given.warmup,
            cooldown=given.cooldown,
            floor=given.floor,
            milestones=tuple(given.milestones),
            gamma=given.gamma,
        )

    def check_repeated(self, why: str) -> None:
        """Refuse what is for a single training that is written; ``why`` is there no sparsifier? Raises ValueError."""
        if self.track or self.format != "dense":
            raise ValueError("track and format are for a single training: leave them out")
        if self.sparsifier is not None:
            raise ValueError(f"{why}: leave the sparsifier out")

    def check(self) -> None:
        """Look up what can be without loading anything. Raises UsageError."""
        from secateur.observe.images import ImageSource

        if self.sparsifier is not None:
            # where the length isn't known yet it is long
            self.sparsifier.made(self.steps or 1_000_000_000, self.seed)
        if self.data.images is not None:
            for source in (self.data.images, str(self.data.test)):
                ImageSource.parse(source, "data")


COMMANDS = {"lottery": "lottery tickets", "stability": "the stability of a training"}
"""keys that make more of a training, and the command of the same name"""
SPECS: dict[str, type[BaseModel]] = {
    "": TrainRecipe,
    "model": ModelSpec,
    "data": DataSpec,
    "schedule": ScheduleSpec,
}
assert set(SHAPES) == set(ScheduleSpec.model_fields["shape"].annotation.__args__)  # type: ignore[union-attr]


def load_train_recipe(path: str | Path, *, trust_remote_code: bool = False, **given: Any) -> TrainRecipe:
    """Read and validate a recipe; ``given`` replaces keys of it. Raises RecipeError with the file and the place.

    Code that the file names is refused with a UsageError unless ``trust_remote_code`` is set.
    """
    return trusted(make_train_recipe({**read_recipe(path), **given}, str(path)), path, trust_remote_code)


def make_train_recipe(data: Mapping[str, Any], where: str) -> TrainRecipe:
    """A validated recipe from plain values; ``where`` names their origin in errors. Raises UsageError."""
    return checked_recipe(TrainRecipe, data, where)


Asked = TypeVar("Asked", bound=TrainRecipe)


def trusted(recipe: Asked, path: str | Path, trust_remote_code: bool) -> Asked:
    """The recipe that was read from ``path``. Raises UsageError for code in it that the user doesn't trust."""
    check_trusted(recipe.model.code(), str(path), trust_remote_code)
    return recipe


def checked_recipe(
    kind: type[Asked], data: Mapping[str, Any], where: str, places: Mapping[str, type[BaseModel]] | None = None
) -> Asked:
    """A recipe of this kind from plain values; ``places`` are keys of its own. Raises UsageError with the place."""
    if "steps" in data and isinstance(data["steps"], list):
        raise RecipeError(f"{where} prunes a trained model in several steps: run it with 'secateur prune --recipe'")
    for key, what in COMMANDS.items():
        if key in data and key not in kind.model_fields:
            raise RecipeError(f"{where} asks for {what}: run it with 'secateur {key}', or leave the key {key} out")
    try:
        recipe = kind.model_validate(data)
    except ValidationError as error:
        raise RecipeError(f"{where}: {explain(error.errors()[0], {**SPECS, **(places or {}), '': kind})}") from None
    try:
        recipe.check()
    except UsageError as error:
        raise type(error)(f"{where}: {error}") from None
    return recipe
