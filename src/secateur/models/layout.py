"""What a cut model differs in from the stock class of its config, as data for config.json."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from secateur.models.decoders import is_skipped
from secateur.models.modeling_secateur import dense_config, layer_sizes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

LAYOUT_VERSION = 1

# some MLP classes note their width and never look at it; the shapes of their weights are what counts
_NOTES = {"intermediate_size"}


def stock_class(model: PreTrainedModel) -> type[PreTrainedModel]:
    """The class of transformers that ``model`` was cut from."""
    return getattr(type(model), "stock_class", type(model))


def layout_of(model: PreTrainedModel) -> dict[str, Any]:
    """The differences between ``model`` and the stock model that its config describes.

    ``modules``: linear modules of another ``shape`` (as stored) or ``bias``. ``parameters``: sizes of norm weights.
    ``attributes``: integers, or lists of them, that modules hold. ``skipped``: modules that have left, ``attention`` or
    ``mlp``, and ``rotated``: the parts of blocks that change the basis; these entries are only there where there is
    something in them. Names are relative to ``model.base_model``; all are empty for a
    model that the stock class can load. ``base`` is the name of the stock class.
    """
    with torch.device("meta"):
        stock = stock_class(model)(dense_config(model.config)).base_model
    layout = {"modules": {}, "parameters": {}, "attributes": {}}
    theirs = dict(stock.named_modules())
    if (parts := rotated_parts(model)) is not None:
        layout["rotated"] = parts
        # the sizes of embeddings follow from these, and the norms have none
        given = {*parts["embeddings"], parts["final_norm"]} - {""}
        layers = range(model.config.num_hidden_layers)
        given |= {f"{parts['blocks']}.{layer}.{norm}" for layer in layers for norm in parts["norms"]}
        theirs = {name: module for name, module in theirs.items() if name not in given}
    for name, module in model.base_model.named_modules():
        if is_skipped(module):
            layout.setdefault("skipped", {})[name] = module.skipped  # type: ignore[assignment]
        elif name in theirs:
            _compare(name, module, theirs[name], layout)
    return {"version": LAYOUT_VERSION, "base": stock_class(model).__name__, **layout}


def is_stock(layout: dict[str, Any]) -> bool:
    """True when nothing differs."""
    return not any(layout.get(what) for what in ("modules", "parameters", "attributes", "skipped", "rotated"))


def rotated_parts(model: nn.Module) -> dict[str, Any] | None:
    """What the blocks of a rotated model say of themselves; None for any other."""
    return next((module.rotated for module in model.modules() if hasattr(module, "rotated")), None)  # type: ignore[misc]


def plain(model: PreTrainedModel) -> bool:
    """True when stock transformers loads the saved model without remote code."""
    return is_stock(layout_of(model)) and stock_accepts(model.config)


def stock_accepts(config: PreTrainedConfig) -> bool:
    """False when the config class refuses its own values on loading.

    Llama, for one, wants the hidden size to be a multiple of the number of heads even where head_dim is given.
    """
    try:
        type(config).from_dict(config.to_dict())
    except Exception:
        return False
    return True


def native_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of a loaded checkpoint as a freshly cut model has it: only sizes that differ stand per layer."""
    native = dense_config(config)
    for name in ("secateur", "auto_map", "allow_global_per_layer_attribute_access"):
        native.__dict__.pop(name, None)
    sizes = {
        layer: {k: v for k, v in layer_sizes(config, layer).items() if v != getattr(native, k, None)}
        for layer in range(config.num_hidden_layers)
    }
    if any(sizes.values()):
        native.per_layer_config = {layer: values for layer, values in sizes.items() if values}
    return native


def _compare(name: str, ours: nn.Module, theirs: nn.Module, layout: dict[str, Any]) -> None:
    linear = isinstance(ours, nn.Linear) or type(ours).__name__ == "Conv1D"
    if linear:
        if _linear(ours) != _linear(theirs):
            layout["modules"][name] = _linear(ours)
        return
    their_sizes = {leaf: p.shape for leaf, p in theirs.named_parameters(recurse=False)}
    for leaf, parameter in ours.named_parameters(recurse=False):
        if parameter.dim() == 1 and their_sizes.get(leaf) != parameter.shape:
            layout["parameters"][f"{name}.{leaf}"] = parameter.numel()
    values = {key: value for key, value in _integers(ours).items() if _integers(theirs).get(key) != value}
    if values:
        layout["attributes"][name] = values


def _linear(module: nn.Module) -> dict[str, Any]:
    return {"shape": list(module.weight.shape), "bias": module.bias is not None}  # type: ignore[arg-type]


def _integers(module: nn.Module) -> dict[str, Any]:
    """Public integer attributes of the module itself; tuples of integers as lists, as JSON has them."""
    found = {}
    for key, value in vars(module).items():
        if key.startswith("_") or key in _NOTES or isinstance(value, bool):
            continue
        if isinstance(value, int):
            found[key] = value
        elif isinstance(value, tuple) and value and all(type(v) is int for v in value):
            found[key] = list(value)
    return found
