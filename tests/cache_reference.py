"""A second, slow way to attend to a compressed cache: the whole text dense, with zeros and masks for what is gone."""

from __future__ import annotations

import atexit
import dataclasses
import itertools
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_utils import AttentionInterface

from secateur.cache.layer import CompressedLayer
from secateur.methods import get_method
from secateur.methods.surrogates import Surrogate

SMALL = 8


def small_options(name: str) -> str:
    """Options that make windows, blocks and chunks of a method fit prompts of some twenty tokens."""
    fields = get_method(name).option_fields().values()
    small = [f for f in fields if f.metadata["unit"] == "tokens" and f.default > SMALL]
    if "surrogate" in get_method(name).option_fields():
        return f",surrogate={random_surrogate()},window={SMALL}"
    # a budget is more than the window that it holds
    return "".join(f",{f.name}={2 * SMALL if f.name == 'budget' else SMALL}" for f in small)


@cache
def random_surrogate() -> str:
    """A folder with a surrogate for the tiny llama."""
    generator = torch.Generator().manual_seed(0)
    layers = [((torch.randn(2, 32, generator=generator), torch.zeros(2)),) for _ in range(3)]
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    surrogate = Surrogate(tuple(layers))
    (folder / "config.json").write_text(json.dumps(surrogate.config()))
    save_file(surrogate.tensors(), folder / "model.safetensors")
    return str(folder)


def small_spec(name: str, sparsity: float = 0.5) -> str:
    """The method at that sparsity for short prompts; a wrapper's own method is made small too."""
    of = get_method(name).option_fields().get("of")
    inner = f"({of.default}:{small_options(of.default)[1:]})".replace(":)", ")") if of else ""
    return f"{name}{inner}:{sparsity}{small_options(name)}"


def as_dense(layer: CompressedLayer) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values [B, K, text, E] with zeros for what is gone, and which tokens are still there [B, K, text]."""
    batch, heads, _, width = layer.keys.shape
    keys, values = (torch.zeros(batch, heads, layer.seen, width, dtype=layer.keys.dtype) for _ in range(2))
    there = torch.zeros(batch, heads, layer.seen, dtype=torch.bool)

    def put(b: Any, k: Any, positions: Tensor, rows: tuple[Tensor, Tensor]) -> None:
        index = positions[..., None].expand(-1, -1, -1, width)
        for whole, part in zip((keys, values), rows, strict=True):
            whole[b, k] = whole[b, k].scatter(2, index, part)
        there[b, k] = there[b, k].scatter(2, positions, True)

    if layer.store is not None:
        for span, b, k in layer.store.spans():
            rows = (layer.store.keys.dense(span), layer.store.values.dense(span))
            put(b, k, layer.store.text_positions(span), rows)
    positions = layer.tail_positions()
    for b, k in itertools.product(range(batch), range(heads)):
        own = positions[b, k] >= 0  # other rows are blank
        rows = (layer.keys[b, k, own][None, None], layer.values[b, k, own][None, None])
        put(slice(b, b + 1), slice(k, k + 1), positions[b, k, own][None, None], rows)
    return keys, values, there


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **arguments: Any):
    import sys

    eager = sys.modules[type(module).__module__].eager_attention_forward
    there = module.there
    if there is not None:
        gone = torch.zeros(*there.shape[:2], 1, key.shape[2], dtype=query.dtype)
        gone[..., : there.shape[2]].masked_fill_(~there[:, :, None], torch.finfo(query.dtype).min)
        gone = gone.repeat_interleave(query.shape[1] // gone.shape[1], dim=1)
        mask = gone if mask is None else torch.minimum(gone.expand(-1, -1, mask.shape[-2], -1), mask.expand_as(gone))
    return eager(module, query, key, value, mask, **arguments)


def reference_logits(model: nn.Module, held: Any, new: Tensor, mask: Tensor) -> Tensor:
    """Logits of ``new`` tokens [B, T], fed one by one, on what the cache ``held`` holds, [B, T, V]; it stays."""
    AttentionInterface.register("masked_reference", _attention)
    dense = DynamicCache(config=model.config)
    modules = {m.layer_idx: m for m in model.modules() if "Attention" in type(m).__name__ and hasattr(m, "layer_idx")}
    for index, layer in enumerate(held.layers):
        modules[index].there = None
        if isinstance(layer, CompressedLayer):
            keys, values, modules[index].there = as_dense(layer)
        else:
            keys, values = layer.keys, layer.values
        dense.layers[index].update(keys.clone(), values.clone())
        if hasattr(layer, "cumulative_length"):
            dense.layers[index].cumulative_length = layer.cumulative_length
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    eager_configs = {id(m.config): m.config for m in modules.values()}
    handles = []
    for module in modules.values():
        handles.append(module.register_forward_pre_hook(lambda m, a: _name(m.config, "masked_reference")))
        handles.append(module.register_forward_hook(lambda m, a, r: _name(m.config, "eager")))
    found = []
    try:
        for t in range(new.shape[1]):
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=-1)
            positions = mask.cumsum(dim=-1)[:, -1:] - 1
            with torch.no_grad():
                given = {"position_ids": positions} if takes_positions(model) else {}
                out = model(new[:, t : t + 1], attention_mask=mask, cache=dense, **given)
            found.append(out.logits)
    finally:
        for handle in handles:
            handle.remove()
        for config in eager_configs.values():
            _name(config, before)
        model.set_attn_implementation(before)
    return torch.cat(found, dim=1)


def takes_positions(model: nn.Module) -> bool:
    import inspect

    return "position_ids" in inspect.signature(model.forward).parameters


def _name(config: Any, name: str) -> None:
    config._attn_implementation_internal = name


@dataclasses.dataclass(frozen=True)
class Generated:
    """What greedy generation gave: tokens [B, new] and their logits [B, new, V]."""

    tokens: Tensor
    logits: Tensor


def generate(model: nn.Module, ids: Tensor, mask: Tensor | None = None, new: int = 6, **arguments: Any) -> Generated:
    """Greedy, ``new`` tokens, none of which ends the text."""
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **arguments,
    )
    return Generated(out.sequences[:, ids.shape[1] :], torch.stack(out.logits, dim=1))
