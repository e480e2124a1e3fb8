"""A checkpoint opened without reading its weights: the model on the meta device, and where each tensor lies."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from secateur.errors import ModelLoadError
from secateur.models.sources import PackedTensor, stored_names
from secateur.tensorfiles import Stored, read_header

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class NotStreamable(Exception):
    """The checkpoint needs something that only loading it as a whole can do; the message says what."""


def skeleton(folder: str | Path, config: dict[str, Any], *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model that ``folder`` describes, in eval mode: parameters on the meta device, buffers as they should be.

    ``config`` is its parsed config.json.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if "secateur" in config:
        return _cut_skeleton(folder, config["secateur"])
    parsed = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            parsed, dtype=_dtype(parsed, Path(folder)), trust_remote_code=trust_remote_code
        )
    return _ready(model, folder)


def _cut_skeleton(folder: str | Path, layout: dict[str, Any]) -> PreTrainedModel:
    """That of a checkpoint which secateur wrote, as the ordinary model that it was before saving."""
    import transformers
    from transformers import AutoConfig

    from secateur.models.layout import native_config, stock_class
    from secateur.models.modeling_secateur import adopt, pruned

    # the shipped modelling file is the same code, so none of the folder's own is run
    parsed = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    dtype = _dtype(parsed, Path(folder))
    with torch.device("meta"):
        model = pruned(getattr(transformers, layout["base"]))(parsed).to(dtype)
    model.__class__ = stock_class(model)
    adopt(model, native_config(model.config))
    return _ready(model, folder)


def _ready(model: PreTrainedModel, folder: str | Path) -> PreTrainedModel:
    from transformers import GenerationConfig

    model.tie_weights()
    owners = {}
    for name, buffer in model.named_buffers():
        if buffer.is_meta:
            owner, _, leaf = name.rpartition(".")
            module = model.get_submodule(owner)
            if leaf in module._non_persistent_buffers_set:
                module._buffers[leaf] = torch.empty_like(buffer, device="cpu")
                owners[owner] = module
    # transformers computes buffers that no checkpoint holds, such as rotary frequencies, where it makes new weights
    for module in owners.values():
        model._init_weights(module)
    model.config._name_or_path = str(folder)
    if (Path(folder) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


def _dtype(config: Any, folder: Path) -> torch.dtype:
    """What transformers takes for ``auto``: the dtype of the config, or that of the first floating weight."""
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    with suppress(ModelLoadError):  # there may be no weights, just a description
        return next((s.dtype for s in tensor_map(folder).values() if s.dtype.is_floating_point), torch.float32)
    return torch.float32


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
        model = skeleton(folder, json.loads((folder / "config.json").read_text(encoding="utf8")))
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


def tensor_map(folder: str | Path) -> dict[str, Stored]:
    """Every tensor in the safetensors files of ``folder`` by its name there.

    Raises ModelLoadError for a missing or malformed index, CorruptFileError for a damaged file.
    """
    found: dict[str, Stored] = {}
    for file in weight_files(Path(folder)):
        found |= read_header(Path(folder) / file)
    return found


def weight_files(folder: Path) -> list[str]:
    """Names of the weight files, from the index where there is one. Raises ModelLoadError."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            return sorted(set(json.loads(index.read_text(encoding="utf8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError):
            raise ModelLoadError(f"{index} is not a valid index of weight files") from None
    if (folder / "model.safetensors").is_file():
        return ["model.safetensors"]
    pickled = any(folder.glob("pytorch_model*.bin"))
    why = "only pickled ones, which secateur never opens; convert them" if pickled else "no model.safetensors"
    raise ModelLoadError(f"{folder} has no weights in safetensors form: {why}")


def match(model: PreTrainedModel, folder: str | Path, packed: dict[str, Any]) -> dict[str, Stored | PackedTensor]:
    """The names of the skeleton → where the tensor lies; ``packed`` are the dense shapes of packed tensors.

    Raises NotStreamable when a name or shape of the files isn't the model's own.
    """
    rename = _renaming(model)
    files: dict[str, Any] = {rename(name): stored for name, stored in tensor_map(folder).items()}
    for name, shape in packed.items():
        bitmap, values = (files.pop(f"{name}.{part}", None) for part in ("bitmap", "values"))
        if bitmap is None or values is None:
            raise NotStreamable(f"{name} is missing from the packed weights")
        files[name] = PackedTensor(bitmap, values, tuple(shape))
    shapes = {n: tuple(t.shape) for n, t in [*model.named_parameters(), *model.named_buffers()]}
    prefix = f"{model.base_model_prefix}."
    found = {}
    for name in stored_names(model):
        # checkpoints of the bare base model lack the prefix of the whole one, and the other way round
        spellings = (name, name.removeprefix(prefix), prefix + name)
        stored = next((files[s] for s in spellings if s in files), None)
        if stored is None:
            raise NotStreamable(f"{name} is missing from the weights, or has another name there")
        if tuple(stored.shape) != shapes[name]:
            raise NotStreamable(f"{name} has shape {list(stored.shape)}, but the model wants {list(shapes[name])}")
        found[name] = stored
    return found


def published_names(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """Names of a model's tensors → those of its published checkpoints, which differ for a few families."""
    rename = _renaming(model, reverse=True)
    return {name: rename(name) for name in names}


def _renaming(model: PreTrainedModel, reverse: bool = False) -> Callable[[str], str]:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    # what is merged or split on loading is left to transformers: its names then don't match
    steps = get_model_conversion_mapping(model, add_legacy=not reverse)
    steps = [step for step in steps if not isinstance(step, WeightConverter)]
    if reverse:
        steps = [step.reverse_transform() for step in reversed(steps)]

    def rename(name: str) -> str:
        for step in steps:
            name = step.rename_source_key(name)[0]
        return name

    return rename
