"""A model without its weights: copies, empty ones, real buffers, and what its tensors are called in a checkpoint."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from secateur.errors import ModelLoadError
from secateur.models.skeleton import skeleton

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


def empty_model(folder: Path, dtypes: Mapping[str, torch.dtype]) -> PreTrainedModel:
    """The model that the config files of ``folder`` describe; its weights hold what happens to be in memory.

    ``dtypes`` are those of the weights, by name. The memory of a weight is taken when it is first written to.
    Raises ModelLoadError when the description is damaged.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf8"))
        model = skeleton(folder, config, len(dtypes))
        compute_buffers(model)
    except Exception as error:
        raise ModelLoadError(f"{folder} describes no model that can be built: {error}") from error
    real = {
        id(p): nn.Parameter(torch.empty(p.shape, dtype=dtypes.get(name, p.dtype)), requires_grad=p.requires_grad)
        for name, p in model.named_parameters()
    }
    for module in model.modules():
        for leaf, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            setattr(module, leaf, real[id(parameter)])
    return model


def set_dtype(model: PreTrainedModel, otherwise: torch.dtype) -> None:
    """Let a skeleton have the dtype that transformers takes for ``auto``: that of its config, or ``otherwise``."""
    declared = model.config.dtype
    dtype = declared if isinstance(declared, torch.dtype) else otherwise
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def compute_buffers(model: PreTrainedModel) -> None:
    """Give a skeleton the buffers that no checkpoint holds, such as rotary frequencies, on the CPU."""
    owners = {}
    for name, buffer in model.named_buffers():
        if buffer.is_meta:
            owner, _, leaf = name.rpartition(".")
            module = model.get_submodule(owner)
            if leaf in module._non_persistent_buffers_set:
                module._buffers[leaf] = torch.empty_like(buffer, device="cpu")
                owners[owner] = module
    # transformers computes them where it makes new weights
    for module in owners.values():
        model._init_weights(module)


def published_names(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """Names of a model's tensors → those of its published checkpoints, which differ for a few families."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    # what is merged or split on loading is left to transformers
    steps = [s for s in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(s, WeightConverter)]
    steps = [step.reverse_transform() for step in reversed(steps)]

    def rename(name: str) -> str:
        for step in steps:
            name = step.rename_source_key(name)[0]
        return name

    return {name: rename(name) for name in names}
