"""Networks that a recipe names.

perceptron, resnet20             the two that papers on sparse training begin with, see below
package.module:factory           a function that makes a module, also file.py:factory and torchvision.models:resnet18
timm:NAME                        a model of timm
anything else                    a hub id or a folder, for transformers; smollm2-135m and .gguf files too
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from secateur.drawing import seeded
from secateur.errors import ModelLoadError, UsageError, first_line, nearest, require_extra
from secateur.models.hub import plain_name
from secateur.models.loading import load_model, load_tokenizer
from secateur.remote import expanded
from secateur.trainer.recipe import NETWORKS, TIMM, TrainRecipe
from secateur.usercode import call_object, is_reference, load_object

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Network:
    """A network that is to be trained; ``factory`` is what makes it, where a name of Python does."""

    module: Any
    name: str
    tokenizer: Any = None
    factory: str = ""


def perceptron(sizes: Sequence[int] = (64, 300, 100, 10)) -> nn.Module:
    """Linear layers with ReLU between them, by He's start; 64-300-100-10 is LeNet-300-100 for pictures of 8x8."""
    parts: list[nn.Module] = [nn.Flatten()]
    for before, after in pairwise(sizes):
        layer = nn.Linear(before, after)
        nn.init.kaiming_normal_(layer.weight)
        nn.init.zeros_(layer.bias)
        parts += [layer, nn.ReLU()]
    return nn.Sequential(*parts[:-1])


class _Block(nn.Module):
    """Two convolutions and a shortcut without parameters, which subsamples and pads."""

    def __init__(self, before: int, width: int) -> None:
        super().__init__()
        stride = 1 if before == width else 2
        self.conv1 = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.stride, self.grown = stride, width - before

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.grown))
        return F.relu(self.norm2(self.conv2(y)) + shortcut)


def resnet20(classes: int = 10, channels: int = 3, width: int = 16, blocks: int = 3) -> nn.Module:
    """The ResNet for CIFAR of K. He et al., arXiv:1512.03385: 6 ``blocks`` + 2 layers, ``width`` channels at first."""
    widths = [width] * blocks + [2 * width] * blocks + [4 * width] * blocks
    stem = [nn.Conv2d(channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    body = [_Block(before, after) for before, after in pairwise([width, *widths])]
    return nn.Sequential(*stem, *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, classes))


OWN = {"perceptron": perceptron, "resnet20": resnet20}
assert tuple(OWN) == NETWORKS


def open_network(recipe: TrainRecipe, *, trust_remote_code: bool = False, progress: Progress | None = None) -> Network:
    """What the recipe names, in float32 on its device; what is random follows from its seed.

    Raises UsageError, ModelLoadError or MissingExtraError.
    """
    with seeded(recipe.seed):
        return draw_network(recipe, trust_remote_code=trust_remote_code, progress=progress)


def draw_network(recipe: TrainRecipe, *, trust_remote_code: bool = False, progress: Progress | None = None) -> Network:
    """The same; what is random follows from the random numbers of torch as they are."""
    kind = _language if recipe.data.text is not None else _classifier
    found = kind(recipe, trust_remote_code, progress)
    try:
        found.module.float().to(recipe.device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {recipe.device} can't be used: {first_line(error)}") from None
    return found


def first_network(recipe: TrainRecipe, module: Any, *, trust_remote_code: bool = False) -> Any:
    """What every one of many trainings begins with: a function that draws the network, or the pretrained one itself.

    ``module`` is the network that ``open_network`` gave.
    """
    if recipe.data.text is None or recipe.model.start == "random":
        return lambda: draw_network(recipe, trust_remote_code=trust_remote_code).module
    return module


def _classifier(recipe: TrainRecipe, trust_remote_code: bool, progress: Progress | None) -> Network:
    spec = recipe.model
    if spec.tokenizer is not None:
        raise UsageError("model.tokenizer is for language models")
    if spec.name in OWN:
        return Network(_made(spec.name, OWN[spec.name], spec.options), spec.name, factory=f"{__name__}:{spec.name}")
    if spec.name.startswith(TIMM):
        return Network(_of_timm(spec.name.removeprefix(TIMM), recipe), spec.name)
    if spec.factory:
        return Network(_of_factory(recipe), spec.name.rpartition(":")[2], factory=spec.factory)
    if not ("/" in spec.name or expanded(spec.name).exists()):
        raise UsageError(
            f"there is no network '{spec.name}'{nearest(spec.name, OWN)} (it is one of {', '.join(OWN)}, timm:NAME,"
            " package.module:factory, a folder or a hub id)"
        )
    return Network(_of_transformers(recipe, trust_remote_code), plain_name(spec.name))


def _language(recipe: TrainRecipe, trust_remote_code: bool, progress: Progress | None) -> Network:
    spec = recipe.model
    model: Any
    if is_reference(spec.name):
        model, tokenizer = _of_factory(recipe), None
        if spec.tokenizer is None:
            raise UsageError(f"{spec.name} makes a model without a tokenizer: name one with model.tokenizer")
    else:
        if spec.options:
            raise UsageError("model.options are for networks that a function makes")
        model, tokenizer = load_model(
            spec.name, dtype="float32", trust_remote_code=trust_remote_code, progress=progress
        )
    if spec.start == "random":
        model = type(model)(copy.deepcopy(model.config))
    if spec.tokenizer is not None:
        tokenizer = load_tokenizer(spec.tokenizer, trust_remote_code)
    model.secateur_name = plain_name(spec.name)
    return Network(model, plain_name(spec.name), tokenizer, spec.name if is_reference(spec.name) else "")


def _of_factory(recipe: TrainRecipe) -> nn.Module:
    spec = recipe.model
    if spec.start == "pretrained":
        raise UsageError(f"{spec.name} decides by itself how it starts: leave model.start out")
    made = load_object(spec.name)
    if isinstance(made, nn.Module):
        return made
    if not callable(made):
        raise UsageError(f"{spec.name} must be a torch.nn.Module or a function that makes one")
    found = _made(spec.name, made, spec.options)
    if not isinstance(found, nn.Module):
        raise UsageError(f"{spec.name} must make a torch.nn.Module, it made {type(found).__name__}")
    return found


def _made(name: str, function: Callable[..., Any], options: dict[str, Any]) -> Any:
    accepted = inspect.signature(function).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
        for key in options:
            if key not in accepted:
                raise UsageError(f"{name} has no option '{key}'{nearest(key, accepted)}")
    return call_object(name, lambda: function(**options))


def _of_timm(name: str, recipe: TrainRecipe) -> nn.Module:
    timm: Any = require_extra("timm", "vision", f"timm:{name}")
    known = timm.list_models()
    if name.partition(".")[0] not in known:
        raise UsageError(f"timm has no model '{name}'{nearest(name, known)}")
    pretrained = recipe.model.start == "pretrained"
    try:
        return timm.create_model(name, pretrained=pretrained, **recipe.model.options)
    except Exception as error:  # what its models and the hub raise
        raise ModelLoadError(f"timm:{name} can't be made: {first_line(error)}") from None


def _of_transformers(recipe: TrainRecipe, trust_remote_code: bool) -> nn.Module:
    from transformers import AutoConfig, AutoModelForImageClassification

    spec = recipe.model
    if "trust_remote_code" in spec.options:
        raise UsageError("trust_remote_code is no option of a model: pass --trust-remote-code (trust_remote_code=True)")
    told: dict[str, Any] = {**spec.options, "trust_remote_code": trust_remote_code}
    try:
        if spec.start == "random":
            return AutoModelForImageClassification.from_config(AutoConfig.from_pretrained(spec.name, **told))
        given = {"use_safetensors": True, "use_kernels": False, **told}
        return AutoModelForImageClassification.from_pretrained(spec.name, **given)
    except Exception as error:  # whatever files, configs and the hub are wrong with
        raise ModelLoadError(f"{spec.name} can't be loaded as a classifier of images: {first_line(error)}") from None
