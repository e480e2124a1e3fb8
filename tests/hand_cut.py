"""Tiny random decoders, and the few lines that cut them by hand: a second opinion on the library's surgery."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

HEAD_DIM = 8
COMMON = {"vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA_LIKE = {
    **COMMON,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 64,
}


def tiny(model_type: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model: 3 layers, hidden size 48, 6 heads of 8 (3 kv heads where the family has them), 40 neurons."""
    torch.manual_seed(seed)
    if model_type == "gpt2":
        sizes = {**COMMON, "n_embd": 48, "n_layer": 3, "n_head": 6, "n_inner": 40, "n_positions": 64}
    else:
        sizes = LLAMA_LIKE
    config = CONFIG_MAPPING[model_type](**{**sizes, **changes})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # larger than the published initialisation, so that every part shows in the logits
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.eval()


def slice_linear(module: Any, *, rows: Any = None, columns: Any = None, bias: bool = False) -> None:
    """Keep outputs ``rows`` and inputs ``columns``; ``bias`` adds one where there is none."""
    weight = module.weight.data if isinstance(module, nn.Linear) else module.weight.data.T
    weight = weight if rows is None else weight[rows]
    weight = weight if columns is None else weight[:, columns]
    if module.bias is not None and rows is not None:
        module.bias = nn.Parameter(module.bias.data[rows])
    if module.bias is None and bias:
        module.bias = nn.Parameter(torch.randn(weight.shape[0]))
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
        module.weight = nn.Parameter(weight.contiguous())
    else:
        module.nf, module.nx = weight.shape
        module.weight = nn.Parameter(weight.T.contiguous())


def rows_of(heads: list[int]) -> torch.Tensor:
    """The rows of the projection that belong to these heads."""
    return (torch.tensor(heads)[:, None] * HEAD_DIM + torch.arange(HEAD_DIM)).flatten()


def cut_llama(model: PreTrainedModel, kv_heads: list[list[int]], neurons: int, bias: bool = True) -> PreTrainedModel:
    """Keep these kv heads per layer (with their two query heads) and the first neurons; add biases."""
    for layer, keep in zip(model.model.layers, kv_heads, strict=True):
        queries = [2 * head + i for head in keep for i in (0, 1)]
        attention, mlp = layer.self_attn, layer.mlp
        slice_linear(attention.q_proj, rows=rows_of(queries))
        slice_linear(attention.k_proj, rows=rows_of(keep))
        slice_linear(attention.v_proj, rows=rows_of(keep))
        slice_linear(attention.o_proj, columns=rows_of(queries), bias=bias)
        slice_linear(mlp.gate_proj, rows=slice(neurons))
        slice_linear(mlp.up_proj, rows=slice(neurons))
        slice_linear(mlp.down_proj, columns=slice(neurons), bias=bias)
    return model


def cut_phi3(model: PreTrainedModel, kv_heads: list[list[int]]) -> PreTrainedModel:
    """The same for fused projections, and an extra bias on o_proj; neurons stay."""
    for layer, keep in zip(model.model.layers, kv_heads, strict=True):
        queries = [2 * head + i for head in keep for i in (0, 1)]
        attention = layer.self_attn
        fused = queries + [6 + head for head in keep] + [9 + head for head in keep]
        slice_linear(attention.qkv_proj, rows=rows_of(fused))
        slice_linear(attention.o_proj, columns=rows_of(queries), bias=True)
        attention.num_key_value_heads = len(keep)
    return model


def cut_gpt2(model: PreTrainedModel, heads: list[list[int]], neurons: int) -> PreTrainedModel:
    """Keep these heads per layer and the first neurons; GPT-2 has biases everywhere."""
    for block, keep in zip(model.transformer.h, heads, strict=True):
        fused = keep + [6 + head for head in keep] + [12 + head for head in keep]
        slice_linear(block.attn.c_attn, rows=rows_of(fused))
        slice_linear(block.attn.c_proj, columns=rows_of(keep))
        block.attn.num_heads, block.attn.split_size = len(keep), len(keep) * HEAD_DIM
        slice_linear(block.mlp.c_fc, rows=slice(neurons))
        slice_linear(block.mlp.c_proj, columns=slice(neurons))
    return model


def ragged(model_type: str, **changes: Any) -> PreTrainedModel:
    """A cut model whose layers differ in their heads, with its per-layer config."""
    from secateur.models.modeling_secateur import adopt, dense_config

    keep = [[0, 2], [1], [0, 1, 2]]
    if model_type == "gpt2":
        model = cut_gpt2(tiny("gpt2", **changes), [[0, 2, 5], [1], [0, 1, 2, 3]], neurons=24)
        sizes = [{"num_attention_heads": n, "n_inner": 24} for n in (3, 1, 4)]
    else:
        dense = tiny(model_type, **changes)
        model = cut_phi3(dense, keep) if model_type == "phi3" else cut_llama(dense, keep, neurons=24)
        ffn = 40 if model_type == "phi3" else 24
        sizes = [
            {"num_attention_heads": 2 * len(k), "num_key_value_heads": len(k), "intermediate_size": ffn} for k in keep
        ]
    config = dense_config(model.config)
    config.per_layer_config = dict(enumerate(sizes))
    adopt(model, config)
    return model


def without_sub_layers(**changes: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A Llama of 6 layers, of which 1, 3 and 5 have no attention and 2, 3 and 5 no FFN; one where those add nothing.

    The first can't be run: its projections have no rows or no columns.
    """
    cut, silenced = (tiny("llama", num_hidden_layers=6, **changes) for _ in range(2))
    for layer, parts in {1: ("self_attn",), 2: ("mlp",), 3: ("self_attn", "mlp"), 5: ("self_attn", "mlp")}.items():
        for part in parts:
            module = getattr(cut.model.layers[layer], part)
            for name, linear in module.named_children():
                if isinstance(linear, nn.Linear):
                    reads = name in ("o_proj", "down_proj")
                    linear.weight = nn.Parameter((linear.weight[:, :0] if reads else linear.weight[:0]).detach())
            getattr(silenced.model.layers[layer], part).apply(_silence)
    return cut, silenced


def _silence(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.weight)
