"""Transformers classes for checkpoints that secateur has cut; this file travels with the checkpoint.

A cut model is a stock model some of whose modules are smaller, or have a bias that the stock class lacks. What
differs stands in config.json under ``secateur``; the classes here build the stock model, change those modules and
let transformers load the weights. ``Pruned<Name>`` exists for every model class ``<Name>`` of transformers, for
example ``PrunedLlamaForCausalLM``. Nothing but transformers and what it brings is needed.
"""

# _Pruned is mixed into model classes, which a type checker can't know:
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false

import copy
import functools
import json
import shutil
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, Cache, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils.hub import cached_file

_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def layer_sizes(config, layer):
    """The config entries of one layer that differ from layer to layer; empty for a uniform model."""
    stored = getattr(config, "per_layer_config", None) or {}
    if isinstance(stored, dict):  # transformers that knows no per-layer configs keeps what config.json says
        return next((sizes for key, sizes in stored.items() if int(key) == layer), {})
    return {name: getattr(stored[layer], name) for name in getattr(config, "per_layer_attributes", None) or ()}


class LayerConfig:
    """The model's config as one layer sees it: that layer's sizes first, then whatever the model's config says now.

    It is a view, so a later change of the model's config, such as another attention kernel, reaches the layer.
    """

    def __init__(self, config, layer):
        self.__dict__.update(_config=config, _sizes=layer_sizes(config, layer))

    def __getattr__(self, name):
        # copy and pickle ask before the view is filled
        if "_config" not in self.__dict__ or name.startswith("__"):
            raise AttributeError(name)
        return self._sizes[name] if name in self._sizes else getattr(self._config, name)

    def __setattr__(self, name, value):
        setattr(self._config, name, value)


def dense_config(config):
    """A copy of ``config`` with which the stock class can be built; sizes are then changed by ``resize``."""
    dense = copy.copy(config)
    dense.__dict__.pop("_heterogeneity_spec", None)
    dense.__dict__.pop("per_layer_config", None)
    for name, value in (getattr(config, "secateur", None) or {}).get("config", {}).items():
        setattr(dense, name, value)
    return dense


class Skipped(nn.Module):
    """Stands where an ``attention`` or an ``mlp`` has left a block: it adds nothing to the residual stream.

    In place of an attention it still has the cache count the tokens, one number for each: transformers asks the first
    layer of every kind how many there were.
    """

    def __init__(self, skipped, layer_idx):
        super().__init__()
        self.skipped, self.layer_idx = skipped, layer_idx

    def forward(self, hidden_states, *args, **kwargs):
        nothing = torch.zeros_like(hidden_states)
        if self.skipped == "mlp":
            return nothing
        for value in (*args, *kwargs.values()):
            if isinstance(value, Cache):
                counted = nothing[:, None, :, :1]
                value.update(counted, counted, self.layer_idx)
        return nothing, None


def skip(model, name, kind):
    """Let a ``Skipped`` of this kind stand in place of the module ``name`` of a layer of ``model``."""
    path, _, leaf = name.rpartition(".")
    layer = next(int(part) for part in path.split(".") if part.isdigit())
    setattr(model.get_submodule(path), leaf, Skipped(kind, layer))


class PlainNorm(nn.Module):
    """RMSNorm without a scale, over hidden states that had ``size`` entries in the dense model and have fewer now."""

    def __init__(self, size, eps):
        super().__init__()
        self.size, self.eps = size, eps

    def forward(self, hidden_states):
        # float64 models stay exact
        wide = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        mean = wide.pow(2).sum(-1, keepdim=True) / self.size
        return (wide * torch.rsqrt(mean + self.eps)).to(hidden_states.dtype)


class _Rotated:
    """Mixed into the class of a decoder block whose residual connections change from one basis to another.

    ``rotated`` names its parts. Every sub-layer reads a plain norm and adds to ``x @ S``, S being its shortcut; with
    ``parallel`` both read the same and there is one shortcut.
    """

    def forward(self, hidden_states, *args, **kwargs):
        parts = self.rotated
        # a decoder that could attend to an encoder says that there is none
        given = {name: value for name, value in kwargs.items() if not name.startswith("encoder_")}
        # what an attention adds to, and what an MLP does, is scaled in some families
        scale = getattr(self, "residual_multiplier", 1)
        first, second = (self.get_submodule(name) for name in parts["norms"])
        attended = self.get_submodule(parts["attention"])(first(hidden_states), *args, **given)[0] * scale
        if not parts["parallel"]:
            hidden_states = self.attention_shortcut(hidden_states) + attended
        added = second(hidden_states)
        for name in parts["mlp"]:
            added = self.get_submodule(name)(added)
        residual = self.mlp_shortcut(hidden_states)
        return residual + attended + added if parts["parallel"] else residual + added * scale


@functools.cache
def rotated(stock):
    """The subclass of a decoder block with a basis of its own behind every sub-layer; it keeps the name."""
    return type(stock.__name__, (_Rotated, stock), {"__module__": __name__})


def rotate(base_model, parts):
    """Change the blocks of a stock ``base_model``, in place, to those of a rotated one; weights are new.

    ``parts`` says where they are, how wide the hidden states have become (``width``) and how wide they were
    (``size``), which the last block restores unless the head is sliced too, and the ``final_norm`` with it.
    """
    width, size = parts["width"], parts["size"]
    for name in parts["embeddings"]:
        embedding = base_model.get_submodule(name)
        embedding.weight = nn.Parameter(embedding.weight.new_empty(embedding.weight.shape[0], width))
        embedding.embedding_dim = width
    blocks = base_model.get_submodule(parts["blocks"])
    like = next(base_model.get_submodule(parts["embeddings"][0]).parameters())

    def shortcut(outputs):
        return nn.Linear(width, outputs, bias=False, dtype=like.dtype, device=like.device)

    for layer, block in enumerate(blocks):
        block.__class__ = rotated(type(block))
        block.rotated = parts
        for name in parts["norms"]:
            norm = block.get_submodule(name)
            path, _, leaf = name.rpartition(".")
            eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
            setattr(block.get_submodule(path), leaf, PlainNorm(size, eps))
        if not parts["parallel"]:
            block.attention_shortcut = shortcut(width)
        restores = layer + 1 == len(blocks) and not parts["final_norm"]
        block.mlp_shortcut = shortcut(size if restores else width)
    if parts["final_norm"]:
        norm = base_model.get_submodule(parts["final_norm"])
        setattr(base_model, parts["final_norm"], PlainNorm(size, norm.variance_epsilon))


def resize(base_model, layout):
    """Change the modules of a stock ``base_model``, in place, to the sizes in ``layout``; weights are new."""
    if "rotated" in layout:
        rotate(base_model, layout["rotated"])
    for name, kind in layout.get("skipped", {}).items():
        skip(base_model, name, kind)
    for name, sizes in layout.get("modules", {}).items():
        _resize_linear(base_model.get_submodule(name), sizes["shape"], sizes["bias"])
    for name, size in layout.get("parameters", {}).items():
        path, _, leaf = name.rpartition(".")
        module = base_model.get_submodule(path)
        setattr(module, leaf, nn.Parameter(torch.ones_like(getattr(module, leaf)[:1]).repeat(size)))
    for name, values in layout.get("attributes", {}).items():
        module = base_model.get_submodule(name)
        for key, value in values.items():
            setattr(module, key, tuple(value) if isinstance(value, list) else value)


def _resize_linear(module, shape, bias):
    old, linear = module.weight, isinstance(module, nn.Linear)
    module.weight = nn.Parameter(nn.init.normal_(old.new_empty(shape), std=0.02))
    outputs, inputs = shape if linear else reversed(shape)  # GPT-2's Conv1D stores [inputs, outputs]
    module.bias = nn.Parameter(old.new_zeros(outputs)) if bias else None
    for name, value in {"out_features": outputs, "in_features": inputs, "nf": outputs, "nx": inputs}.items():
        if hasattr(module, name):
            setattr(module, name, value)


def adopt(model, config):
    """Make ``config`` the config of ``model``; modules inside a layer get that layer's view of it."""
    stock = model.config
    for path, module in model.named_modules():
        held = getattr(module, "config", None)
        layer = next((int(part) for part in path.split(".") if part.isdigit()), None)
        if isinstance(module, PreTrainedModel):
            module.config = config
        elif layer is not None and (held is stock or isinstance(held, LayerConfig)):
            module.config = LayerConfig(config, layer) if layer_sizes(config, layer) else config


def unpack_tensor(name, bitmap, values, shape):
    """The dense tensor of ``shape``: bit i (least significant first) of ``bitmap`` says whether entry i is stored."""
    count = 1
    for size in shape:
        count *= size
    if bitmap.dtype != torch.uint8 or bitmap.shape != ((count + 7) // 8,):
        raise ValueError(f"the bitmap of {name} must hold {(count + 7) // 8} bytes, got {list(bitmap.shape)}")
    kept = np.unpackbits(bitmap.numpy(), count=count, bitorder="little").view(bool)
    ones = int(np.count_nonzero(kept))
    if values.shape != (ones,):
        raise ValueError(f"{name} has {values.numel()} values for {ones} ones in its bitmap")
    dense = torch.zeros(count, dtype=values.dtype)
    return dense.masked_scatter_(torch.from_numpy(kept), values).reshape(shape)


def unpack(tensors, shapes):
    """Packed state dict → dense state dict; ``shapes`` maps the packed tensors to their dense shapes."""
    parts = {f"{name}.{part}" for name in shapes for part in ("bitmap", "values")}
    missing = sorted(parts - set(tensors))
    if missing:
        raise ValueError(f"{missing[0]} is missing from the packed weights")
    dense = {name: tensor for name, tensor in tensors.items() if name not in parts}
    for name, shape in shapes.items():
        dense[name] = unpack_tensor(name, tensors[f"{name}.bitmap"], tensors[f"{name}.values"], shape)
    return dense


def _read_tensors(folder, hub):
    index = cached_file(folder, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False, **hub)
    names = ["model.safetensors"]
    if index is not None:
        names = sorted(set(json.loads(Path(index).read_text(encoding="utf8"))["weight_map"].values()))
    tensors = {}
    for name in names:
        with safe_open(cached_file(folder, name, **hub), framework="pt") as file:
            tensors.update({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118 (not a dict)
    return tensors


class _Pruned:
    def __init__(self, config, *args, **kwargs):
        dense = dense_config(config)
        super().__init__(dense, *args, **kwargs)
        for name in ("_attn_implementation_internal", "_experts_implementation_internal"):
            if name in dense.__dict__:  # settled while the stock model was built
                setattr(config, name, getattr(dense, name))
        resize(self.base_model, config.secateur)
        parts = config.secateur.get("rotated", {})
        head = self.get_output_embeddings()
        if parts.get("final_norm") and head is not None:
            _resize_linear(head, (head.weight.shape[0], parts["width"]), head.bias is not None)
        adopt(self, config)

    @classmethod
    def from_pretrained(cls, folder, *args, **kwargs):
        hub = {name: kwargs[name] for name in _HUB_OPTIONS if kwargs.get(name) is not None}
        if not isinstance(kwargs.get("config"), PreTrainedConfig):
            kwargs["config"] = AutoConfig.from_pretrained(kwargs.get("config") or folder, **hub)
        config = kwargs["config"]
        if "packed" not in config.secateur:
            return super().from_pretrained(folder, *args, **kwargs)
        kwargs["state_dict"] = unpack(_read_tensors(folder, hub), config.secateur["packed"]["tensors"])
        # what is in memory is dense, and is saved as such
        kwargs["config"] = copy.deepcopy(config)
        kwargs["config"].secateur = {k: v for k, v in config.secateur.items() if k != "packed"}
        loaded = super().from_pretrained(None, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.name_or_path = model.config.name_or_path = str(folder)
        if model.can_generate() and cached_file(
            folder, "generation_config.json", _raise_exceptions_for_missing_entries=False, **hub
        ):
            model.generation_config = GenerationConfig.from_pretrained(folder, **hub)
        return loaded

    def save_pretrained(self, save_directory, *args, **kwargs):
        super().save_pretrained(save_directory, *args, **kwargs)
        target = Path(save_directory) / "modeling_secateur.py"
        if not (target.exists() and target.samefile(__file__)):
            shutil.copyfile(__file__, target)


@functools.cache
def pruned(stock):
    """The subclass of a stock model class that loads cut checkpoints of it."""
    return type(f"Pruned{stock.__name__}", (_Pruned, stock), {"__module__": __name__, "stock_class": stock})


def __getattr__(name):
    # auto_map names classes of this file, and there is one for every class of transformers
    stock = getattr(transformers, name[6:], None) if name.startswith("Pruned") else None
    if stock is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return pruned(stock)
