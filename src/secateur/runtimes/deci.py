"""The DeciLM layout (``nemotron-nas``): a folder whose config.json has the sizes of every block, for vLLM and SGLang.

    block_configs[i].attention = {n_heads_in_group, no_op, replace_with_linear}
    block_configs[i].ffn       = {intermediate_size or ffn_mult, no_op, replace_with_linear}

vLLM reads ``ffn_mult`` where there is one, and otherwise ``intermediate_size``. SGLang and llama.cpp's converter read
``ffn_mult`` alone, from which a width follows that is a multiple of 256; so where all widths are such, they are given
as multipliers. All layers have ``num_attention_heads`` query heads; only the number of key-value heads may differ.

Source: vLLM ``models/nemotron_nas.py`` at 00bd149, SGLang ``models/nemotron_nas.py`` at 15a024d.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from secateur.errors import UnsupportedModelError
from secateur.manifest import write_manifest
from secateur.models.saving import write_generation_config
from secateur.models.shards import parse_size, write_shards
from secateur.models.sources import stored_names
from secateur.runtimes import configuration_decilm
from secateur.runtimes.configuration_decilm import width_of
from secateur.runtimes.sizes import Sizes, sizes_of
from secateur.tensorfiles import Made
from secateur.tensorfiles import Source as TensorSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from secateur.models.sources import Source

_TYPES = ("llama", "mistral", "qwen2")
_ATTENTION, _FFN = ("q", "k", "v", "o"), ("gate", "up", "down")
# entries of a Llama config that mean the same here
_SAME = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "tie_word_embeddings",
    "rope_parameters",
)


def write_deci(source: Source, tokenizer: PreTrainedTokenizerBase | None, path: Path, dtype: str) -> None:
    """Fill a folder in the DeciLM layout; weights stay as they are, tensor by tensor.

    Where some projections of the attention or of the FFN have a bias, the others get one of zeros, because one flag
    stands for all. Raises UnsupportedModelError for a model that the layout can't hold.
    """
    sizes = sizes_of(source)
    needs = list(_needs(source.model.config, sizes))
    if needs:
        raise UnsupportedModelError(
            f"vLLM and SGLang would need {', and '.join(needs)} in their DeciLM model to hold this"
            f" {source.model.config.model_type} model"
        )
    tensors = _tensors(source, sizes)
    tallies = write_shards(tensors, path, parse_size("5GB"))
    _config(source, sizes, tensors).save_pretrained(str(path))
    write_generation_config(source.model, path)
    shutil.copyfile(configuration_decilm.__file__, path / "configuration_decilm.py")
    if tokenizer is not None:
        tokenizer.save_pretrained(str(path))
    write_manifest(path, {name: tally.sha256 for name, tally in tallies.items()})


def _needs(config: Any, sizes: Sizes) -> Iterable[str]:
    if config.model_type not in _TYPES:
        yield f"another block than that of a Llama ({', '.join(_TYPES)})"
        return
    attentions = {heads for heads in sizes.heads if heads}
    if len(attentions) > 1:
        yield f"numbers of query heads per layer (here {min(attentions)} to {max(attentions)})"
    if any(heads % kv for heads, kv in zip(sizes.heads, sizes.kv_heads, strict=True) if kv):
        yield "key-value heads that don't divide the query heads"
    if sizes.stray_biases:
        yield "a bias where there is no attention or FFN"
    if not sizes.heads[0]:
        yield "a first layer without attention"
    if getattr(config, "sliding_window", None):
        yield "sliding windows"


def _tensors(source: Source, sizes: Sizes) -> dict[str, TensorSource]:
    """Every tensor of the folder; sub-layers that aren't there leave none, and missing biases are zeros."""
    found: dict[str, TensorSource] = {n: source.origin(n) for n in stored_names(source.model)}
    for group in (_ATTENTION, _FFN):
        paths = [path for path, role in sizes.roles.items() if role in group]
        if any(f"{path}.bias" in found for path in paths):
            for path in (path for path in paths if f"{path}.weight" in found):
                weight = found[f"{path}.weight"]
                zeros = torch.zeros(weight.shape[:1], dtype=weight.dtype)
                found.setdefault(f"{path}.bias", Made.of(zeros))
    for block in sizes.blocks:
        idle = [block.path("self_attn"), block.path("input_layernorm")] if not block.heads else []
        idle += [block.path("mlp"), block.path("post_attention_layernorm")] if not block.neurons else []
        found = {n: t for n, t in found.items() if not n.startswith(tuple(f"{path}." for path in idle))}
    return found


def _config(source: Source, sizes: Sizes, tensors: dict[str, TensorSource]) -> configuration_decilm.DeciLMConfig:
    config = source.model.config
    multiples = [_multiplier(width, sizes.hidden) for width in sizes.neurons]
    blocks = []
    for block, multiple in zip(sizes.blocks, multiples, strict=True):
        width = {"ffn_mult": multiple} if None not in multiples else {"intermediate_size": block.neurons}
        blocks.append(
            {
                "attention": {
                    "n_heads_in_group": block.heads // block.kv_heads if block.heads else None,
                    "no_op": not block.heads,
                    "replace_with_linear": False,
                },
                "ffn": {**width, "no_op": not block.neurons, "replace_with_linear": False},
            }
        )
    made = configuration_decilm.DeciLMConfig(
        block_configs=blocks,
        intermediate_size=max(sizes.neurons),
        attention_bias=any(f"{path}.bias" in tensors for path, role in sizes.roles.items() if role in _ATTENTION),
        mlp_bias=any(f"{path}.bias" in tensors for path, role in sizes.roles.items() if role in _FFN),
        num_attention_heads=max(sizes.heads),
        head_dim=sizes.head_dim,
        **{name: getattr(config, name) for name in _SAME},
    )
    made.architectures = ["DeciLMForCausalLM"]
    made.auto_map = {"AutoConfig": "configuration_decilm.DeciLMConfig"}
    made.dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    return made


def _multiplier(width: int, hidden: int) -> float | None:
    """The multiplier of which all three readers make this width; None where there is none."""
    if not width:
        return 0.0
    # half a neuron more, so that rounding never takes one away
    multiple = 3 * (width + 0.5) / (2 * hidden)
    return multiple if width_of(multiple, hidden) == width else None
