"""A model without its weights: the class, the sizes of every module and the config, and nothing that takes memory."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from secateur.errors import ModelLoadError, require_extra
from secateur.models.layout import layout_of, native_config, stock_class
from secateur.models.loading import quiet
from secateur.models.modeling_secateur import adopt, pruned
from secateur.models.saving import checkpoint_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def weightless_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose parameters are on the meta device; buffers are copied as they are, ties stay."""
    parameters = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in model.parameters()
    }
    # deepcopy takes what the memo holds for an object, so no weight is ever copied
    return copy.deepcopy(model, parameters)


def write_description(model: PreTrainedModel, folder: Path) -> None:
    """Write ``config.json`` and ``generation_config.json``, from which ``read_weightless`` builds the model again."""
    layout = layout_of(model)
    config, remote = checkpoint_config(model, layout)
    config = copy.deepcopy(config)
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.architectures = [f"Pruned{layout['base']}" if remote else layout["base"]]
    with quiet():
        config.save_pretrained(str(folder))
        if model.can_generate() and model.generation_config is not None:
            model.generation_config.save_pretrained(str(folder))


def read_weightless(folder: Path, dtypes: Mapping[str, torch.dtype]) -> PreTrainedModel:
    """The model that ``write_description`` described, in eval mode; its weights hold what happens to be in memory.

    ``dtypes`` are those of the weights, by name. The memory of a weight is taken when it is first written to.
    Raises ModelLoadError when the description is damaged, MissingExtraError without accelerate.
    """
    accelerate = require_extra("accelerate", "train", "a model without weights")
    try:
        # accelerate's context leaves buffers alone: tables of rotary angles are computed, not loaded
        with quiet(), accelerate.init_empty_weights(include_buffers=False):
            model = _build(folder)
    except Exception as error:
        raise ModelLoadError(f"{folder} describes no model that can be built: {error}") from error
    # registering a parameter on the meta device makes a new one of it, which unties
    model.tie_weights()
    _take_memory(model, dtypes)
    return model.eval()  # type: ignore[return-value]


def _build(folder: Path) -> PreTrainedModel:
    import transformers

    layout = json.loads((folder / "config.json").read_text(encoding="utf8")).get("secateur")
    config: Any = transformers.AutoConfig.from_pretrained(str(folder))
    if layout is None:
        model: Any = getattr(transformers, config.architectures[0])(config)
    else:
        model = pruned(getattr(transformers, layout["base"]))(config)
        # like any cut model in memory: sizes differ, the class doesn't
        model.__class__ = stock_class(model)
        adopt(model, native_config(model.config))
    if (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(str(folder))
    return model


def _take_memory(model: PreTrainedModel, dtypes: Mapping[str, torch.dtype]) -> None:
    real = {
        id(p): nn.Parameter(torch.empty(p.shape, dtype=dtypes.get(name, p.dtype)), requires_grad=p.requires_grad)
        for name, p in model.named_parameters()
    }
    for module in model.modules():
        for leaf, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            setattr(module, leaf, real[id(parameter)])
