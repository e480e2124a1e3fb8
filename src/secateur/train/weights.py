"""Which weights of a network are pruned while it is trained, and how their inputs lie."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.utils.parametrize import is_parametrized
from torch.optim.swa_utils import AveragedModel

from secateur.errors import UsageError
from secateur.models.decoders import is_linear
from secateur.networks.compiled import uncompiled
from secateur.structure.groups import matches
from secateur.train.parts import whole

_NAMED = 5
"""How many modules a message names."""


@dataclass(frozen=True)
class Layer:
    """A weight that is pruned; ``inputs`` is the dimension along which its inputs lie, ``module`` what applies it."""

    name: str
    weight: nn.Parameter
    inputs: int
    module: nn.Module

    @property
    def read(self) -> int:
        """How many inputs an output reads: those of its group, where a transposed convolution has several."""
        groups = self.module.groups if isinstance(self.module, _ConvTransposeNd) else 1
        return self.weight.shape[self.inputs] // groups

    def rows(self, scores: Tensor) -> Tensor:
        """Entries as rows along which inputs lie, [rows, inputs]."""
        return scores.movedim(self.inputs, -1).reshape(-1, scores.shape[self.inputs])

    def unrows(self, rows: Tensor) -> Tensor:
        """Inverse of ``rows``."""
        moved = list(self.weight.shape)
        moved.append(moved.pop(self.inputs))
        return rows.reshape(moved).movedim(-1, self.inputs)


def unwrapped(model: nn.Module) -> nn.Module:
    """The module behind torch.compile, data parallelism and averages, whose parameters have their own names."""
    while True:
        if isinstance(model, DistributedDataParallel | DataParallel | AveragedModel):
            model = model.module
        elif (inner := uncompiled(model)) is not model:
            model = inner
        else:
            return model


def find_layers(
    model: nn.Module,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    keep_first: bool = False,
    depthwise: bool = False,
    sharded: bool = False,
) -> dict[str, Layer]:
    """The weights of linear, convolutional, recurrent and attention modules that are trained, by name.

    Norms, biases and embeddings stay, weights that are tied to an embedding too. ``include`` are patterns of further
    parameters of two dimensions or more, ``exclude`` of weights or modules that stay. Raises UsageError, also for
    weights that are sharded over ranks, unless ``sharded``.
    """
    known = dict(_multiplying(model, depthwise))
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
    found: dict[str, Layer] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or parameter.dim() < 2 or not parameter.is_floating_point():
            continue
        wanted = any(matches(name, pattern) for pattern in include)
        if not wanted and (id(parameter) not in known or id(parameter) in embeddings):
            continue
        module, inputs = known.get(id(parameter), (model.get_submodule(name.rpartition(".")[0]), 1))
        if any(matches(one, pattern) for one in _all_names(model, parameter) for pattern in exclude):
            continue
        found[name] = Layer(name, parameter, inputs, module)
    for pattern in (*include, *exclude):
        if not any(matches(name, pattern) for name, _ in model.named_parameters(remove_duplicate=False)):
            raise UsageError(f"no parameter of the model matches '{pattern}'")
    if keep_first and found:
        del found[next(iter(found))]
    if not found:
        why = " once those that exclude and keep_first name are left out" if exclude or keep_first else ""
        how = _left_dense(model, (*include, *exclude)) or "see include and exclude"
        raise UsageError(f"{type(model).__name__} has no weights to prune{why}: {how}")
    parted = next((name for name, layer in found.items() if isinstance(layer.weight, DTensor)), None)
    if parted is not None and not sharded:
        raise UsageError(
            f"{parted} is sharded over ranks, and masks that are found before training or in rounds need whole weights:"
            " use DDP instead, or find them on one rank and begin with masks="
        )
    return found


def warn_of_computed(model: nn.Module, chosen: Sequence[str] = ()) -> None:
    """Warn of weights that are computed from other parameters, but for what the patterns ``chosen`` name."""
    said = _left_dense(model, chosen)
    if said:
        warnings.warn(said, stacklevel=3)


def _left_dense(model: nn.Module, chosen: Sequence[str]) -> str | None:
    """A sentence on the modules whose weights are no parameters, with what to do, or None."""
    computed = [(name, module) for name, module in model.named_modules() if _is_computed(module)]
    names = [name for name, module in computed if not _named(name, module, chosen)]
    if not names:
        return None
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return (
        f"weights of {', '.join(name or 'the module' for name in names[:_NAMED])}{more} are computed from other"
        " parameters (weight_norm, spectral_norm, ...) and stay dense: make plain ones of them first, as"
        " torch.nn.utils.parametrize.remove_parametrizations(module, 'weight') does, or name the modules in exclude"
    )


def _is_computed(module: nn.Module) -> bool:
    if not any(parameter.requires_grad for parameter in module.parameters()):
        return False
    if multiplies(module):
        return "weight" not in module._parameters
    return isinstance(module, nn.RNNBase | nn.RNNCellBase | nn.MultiheadAttention) and is_parametrized(module)


def _named(name: str, module: nn.Module, patterns: Sequence[str]) -> bool:
    own = [f"{name}.{parameter}".removeprefix(".") for parameter, _ in module.named_parameters()]
    return any(matches(one, pattern) for one in own for pattern in patterns)


def multiplies(module: nn.Module) -> bool:
    """Whether a module multiplies its input by its weight: a convolution or a linear one."""
    return isinstance(module, _ConvNd) or is_linear(module)


def _multiplying(model: nn.Module, depthwise: bool) -> Iterator[tuple[int, tuple[nn.Module, int]]]:
    """id of a weight → its module and the dimension of its inputs."""
    for module in model.modules():
        if _is_computed(module) and multiplies(module):
            continue
        if isinstance(module, _ConvNd):
            if depthwise or module.groups == 1 or module.groups < module.in_channels:
                yield id(module.weight), (module, 0 if isinstance(module, _ConvTransposeNd) else 1)
        elif is_linear(module):
            yield id(module.weight), (module, 1 if isinstance(module, nn.Linear) else 0)
        elif isinstance(module, nn.RNNBase | nn.RNNCellBase | nn.MultiheadAttention):
            for parameter in module.parameters(recurse=False):
                if parameter.dim() == 2:
                    yield id(parameter), (module, 1)


def _all_names(model: nn.Module, parameter: Tensor) -> list[str]:
    return [name for name, other in model.named_parameters(remove_duplicate=False) if other is parameter]


def fraction_of_zeros(layers: Mapping[str, Layer]) -> float:
    """Which part of the weights is zero already."""
    zeros = sum(layer.weight.numel() - int(torch.count_nonzero(whole(layer.weight))) for layer in layers.values())
    return zeros / sum(layer.weight.numel() for layer in layers.values())
