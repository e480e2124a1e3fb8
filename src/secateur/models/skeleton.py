"""A checkpoint's model without weights, on the meta device, and what it says about the tensors found in the files."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from secateur.errors import ModelLoadError
from secateur.models.weightfiles import stored_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from secateur.tensorfiles import Stored

# how config.json of one family or another counts its layers
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
# entries that make transformers read, or run, something other than the files that were checked
_DETOURS = ("transformers_weights", "fusion_config")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Shape:
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Checkpoint:
    """A safetensors folder whose headers fit its config: ``model`` is its skeleton, ``stored`` what the files hold.

    ``packed`` has the dense shapes of packed tensors. ``names`` maps names in the model to names in the files; where
    ``converted`` is true, transformers puts some tensors together from several, and those have no entry.
    """

    folder: Path
    model: PreTrainedModel
    stored: Mapping[str, Stored]
    packed: Mapping[str, list[int]]
    names: Mapping[str, str]
    converted: bool

    def read(self, name: str) -> Tensor:
        """One tensor by its name in the model, unpacked. Raises ModelLoadError when bitmap and values disagree."""
        from secateur.models.modeling_secateur import unpack_tensor

        file_name = self.names[name]
        if file_name not in self.packed:
            return self.stored[file_name].read()
        bitmap, values = (self.stored[f"{file_name}.{part}"].read() for part in ("bitmap", "values"))
        try:
            return unpack_tensor(file_name, bitmap, values, self.packed[file_name])
        except ValueError as error:
            raise ModelLoadError(str(error)) from None


def check_detours(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse what would lead transformers to other files, to the network or to a pickle. Raises ModelLoadError."""
    for key in _DETOURS:
        if config.get(key) is not None:
            raise ModelLoadError(f"{folder / 'config.json'} has the entry {key!r}, which secateur doesn't follow")
    for key in ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation"):
        # a name with a slash is a kernel that transformers would fetch from the hub
        if "/" in str(config.get(key) or ""):
            raise ModelLoadError(f"{folder / 'config.json'} asks for code from the hub ({key}: {config[key]!r})")
    if (folder / "adapter_config.json").exists():
        raise ModelLoadError(f"{folder} holds an adapter (adapter_config.json): merge it into its model first")
    if (folder / ".metadata").exists():
        raise ModelLoadError(f"{folder} is a distributed checkpoint with a pickled index; save it as safetensors first")


def skeleton(folder: Path, config: Mapping[str, Any], tensors: int, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model that ``config``, the content of config.json, describes, on the meta device: no memory is taken.

    A cut checkpoint comes as the stock class with its modules resized. ``tensors`` is how many the files hold.
    Raises ModelLoadError, and whatever transformers raises for values that make no sense.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    for key in _LAYER_COUNTS:
        # building a module per layer takes time and memory even without weights
        if isinstance(config.get(key), int) and config[key] > tensors:
            raise ModelLoadError(
                f"{folder}: config.json asks for {config[key]:,} layers, its files hold {tensors} tensors"
            )
    settings = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        if "secateur" in config:
            model = _cut_skeleton(settings, config["secateur"])
        else:
            model = AutoModelForCausalLM.from_config(settings, trust_remote_code=trust_remote_code)
    model.tie_weights()
    model.config._name_or_path = str(folder)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


def examine(folder: Path, config: Mapping[str, Any], trust_remote_code: bool = False) -> Checkpoint:
    """Hold the headers of a safetensors folder against its config.json, whose content ``config`` is; reads no weight.

    Raises ModelLoadError.
    """
    check_detours(folder, config)
    layout = config.get("secateur")
    if "secateur" in config:
        check_layout(str(folder), layout)
    stored = stored_tensors(folder)
    packed = (layout.get("packed") or {}).get("tensors", {}) if layout else {}
    found = dense_shapes(str(folder), stored, packed)
    model = skeleton(folder, config, len(found), trust_remote_code)
    names, converted = check_tensors(str(folder), model, found)
    return Checkpoint(folder, model, stored, packed, names, converted)


def _cut_skeleton(settings: Any, layout: Mapping[str, Any]) -> PreTrainedModel:
    import transformers

    from secateur.models.layout import native_config, stock_class
    from secateur.models.modeling_secateur import adopt, pruned

    model: Any = pruned(getattr(transformers, layout["base"]))(settings)
    model.__class__ = stock_class(model)
    adopt(model, native_config(model.config))
    return model


def check_layout(source: str, layout: Any) -> None:
    """Refuse a ``secateur`` entry of config.json that this version didn't write. Raises ModelLoadError."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from secateur.models.layout import LAYOUT_VERSION
    from secateur.models.packed import PACKED_VERSION

    packed = layout.get("packed", {"version": PACKED_VERSION}) if isinstance(layout, dict) else None
    versions = (layout.get("version"), packed.get("version")) if isinstance(packed, dict) else None
    if versions != (LAYOUT_VERSION, PACKED_VERSION):
        raise ModelLoadError(f"{source} is in a checkpoint format that this secateur doesn't know; update secateur")
    names = [n for v in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for n in ([v] if isinstance(v, str) else v)]
    if layout.get("base") not in names:
        raise ModelLoadError(f"{source}: config.json names no causal language model to cut: {layout.get('base')!r}")


def dense_shapes(source: str, stored: Mapping[str, Stored], shapes: Any) -> dict[str, Shape]:
    """Names and shapes as they are once packed tensors are unpacked; ``shapes`` is that entry of config.json.

    Raises ModelLoadError when bitmap and values can't belong to the shape.
    """
    found = {name: Shape(tensor.shape, tensor.dtype) for name, tensor in stored.items()}
    if not isinstance(shapes, dict):
        raise ModelLoadError(f"{source}: config.json doesn't list the packed tensors")
    for name, shape in shapes.items():
        bitmap, values = found.pop(f"{name}.bitmap", None), found.pop(f"{name}.values", None)
        if bitmap is None or values is None:
            missing = "bitmap" if bitmap is None else "values"
            raise ModelLoadError(f"{name}.{missing} is missing from the packed weights")
        if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
            raise ModelLoadError(f"{source}: config.json gives no valid shape for the packed tensor {name}")
        dense = Shape(tuple(shape), values.dtype)
        wanted = (dense.numel + 7) // 8
        if bitmap.dtype != torch.uint8 or bitmap.shape != (wanted,):
            raise ModelLoadError(f"the bitmap of {name} must hold {wanted} bytes, got {list(bitmap.shape)}")
        if len(values.shape) != 1 or values.numel > dense.numel:
            raise ModelLoadError(f"{name} has {values.numel} values for a tensor of {dense.numel} entries")
        found[name] = dense
    return found


def check_tensors(source: str, model: PreTrainedModel, found: Mapping[str, Shape]) -> tuple[dict[str, str], bool]:
    """Hold the tensors of the files against the skeleton: shapes, dtypes, missing ones, and the size of the whole.

    Returns (name in the model → name in the files, whether some are put together from several). Of those,
    as of experts, only the size of the whole is compared. Raises ModelLoadError.
    """
    wanted: dict[str, Tensor] = model.state_dict()
    names, converted = _model_names(model, list(found), wanted)
    for name in sorted(names):
        shape, stored = tuple(wanted[name].shape), found[names[name]]
        if stored.shape != shape:
            raise ModelLoadError(
                f"{source}: {name} has shape {list(stored.shape)}, but config.json asks for {list(shape)}"
            )
        if wanted[name].is_floating_point() and stored.dtype not in _FLOATS:
            kind = str(stored.dtype).removeprefix("torch.")
            raise ModelLoadError(f"{source}: {name} is stored as {kind}, but secateur prunes float weights only")
    if not converted:
        _check_missing(source, model, names)
    asked, there = sum(p.numel() for p in model.parameters()), sum(shape.numel for shape in found.values())
    if asked > 2 * there + 1_000_000:
        raise ModelLoadError(f"{source}: config.json asks for {asked:,} parameters, its files hold {there:,}")
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    if buffers > 1 << 30:
        raise ModelLoadError(f"{source}: config.json asks for {buffers:,} bytes of tables beside the weights")
    return names, converted


def _check_missing(source: str, model: PreTrainedModel, names: Mapping[str, str]) -> None:
    """Tied weights are there when one of them is; some families don't store what can be computed."""
    ignored = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_missing", None) or ()]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    present = {id(parameters[name]) for name in names if name in parameters}
    missing = sorted(
        name
        for name, p in model.named_parameters()
        if id(p) not in present and not any(i.search(name) for i in ignored)
    )
    if missing:
        more = f" and {len(missing) - 1} more are" if len(missing) > 1 else " is"
        raise ModelLoadError(f"{source}: {missing[0]}{more} missing from the weights")


def _model_names(model: PreTrainedModel, stored: list[str], wanted: dict[str, Tensor]) -> tuple[dict[str, str], bool]:
    """(name in the model → name in the files, whether some are put together from several)."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    names: dict[str, str] = {}
    converted = False
    for name in stored:
        new, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, wanted)
        if pattern is not None:
            converted = True
        elif new in wanted:
            names[new] = name
    return names, converted
