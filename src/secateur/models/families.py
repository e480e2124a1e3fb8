"""The decoder families: one table entry each, no class per family.

An entry says where the parts of a decoder block live and how its fused projections are laid out; everything else
(groups, costs, surgery, config) follows from it in ``decoders`` and ``surgery``. Paths are relative to a block.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Family:
    """Where the parts of a decoder are.

    ``qkv`` holds three modules or one fused one; ``qkv_layout`` says how the rows of a fused one lie:
    ``concatenated`` [all q | all k | all v] or ``grouped`` (per key-value head: its queries, its key, its value).
    ``up`` holds the modules that write the FFN neurons; ``halves`` is how many equal parts a fused one has.
    ``wide_norms`` are norms that run over all heads at once, which makes a masked and a cut model differ.
    ``sizes`` names module attributes that must follow a cut, as an attribute path → ``heads``, ``kv_heads``,
    ``width`` (heads × head_dim) or ``groups`` (heads per kv head). ``*_key`` are the names in the config;
    ``plain_heads`` says whether the stock class accepts fewer heads than hidden_size / head_dim.
    """

    model_type: str
    blocks: str = "layers"
    attention: str = "self_attn"
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    qkv_layout: str = "separate"
    out: str = "o_proj"
    mlp: str = "mlp"
    up: tuple[str, ...] = ("gate_proj", "up_proj")
    halves: int = 1
    down: str = "down_proj"
    wide_norms: tuple[str, ...] = ()
    sizes: tuple[tuple[str, str], ...] = (("self_attn.num_key_value_groups", "groups"),)
    heads_key: str = "num_attention_heads"
    kv_heads_key: str | None = "num_key_value_heads"
    ffn_key: str = "intermediate_size"
    attention_bias_key: str | None = None
    """config flag that gives every attention projection a bias"""
    mlp_bias_key: str | None = None
    plain_heads: bool = True
    norms: tuple[str, str] = ("input_layernorm", "post_attention_layernorm")
    """norms that the attention and the MLP read"""
    positions: str = ""
    """embedding of positions that is added to that of the tokens, relative to the base model"""
    chain: tuple[str, ...] = ()
    """modules that make up the MLP one after the other, where it is none itself"""
    one_basis: str = ""
    """why the hidden states must stay in one basis; empty where every sub-layer may have its own"""
    full_width: str = ""
    """why hidden channels must stay; empty where they may leave"""
    ffn_norm: str = ""
    """norm between what the FFN gives and the sum"""
    factor_key: str = ""
    """config key of the factor of what the FFN gives in the sum"""


_POST_NORMS = "norms behind attentions and FFNs scale what these add, entry by entry"
_SCALED = "embeddings are scaled by the root of the hidden size, which would become another"
_FFN_NORM = "post_feedforward_layernorm"
_HEADS_FOLLOW = "its config gives heads no width of their own: it is the hidden size over the heads"
_LLAMA = Family(model_type="llama", attention_bias_key="attention_bias", mlp_bias_key="mlp_bias")
# one flag gives all four projections a bias in these, and none exists for the MLP
_QWEN3 = Family(model_type="qwen3", attention_bias_key="attention_bias")

_TABLE = (
    _LLAMA,
    replace(_LLAMA, model_type="granite", factor_key="residual_multiplier"),
    replace(_LLAMA, model_type="smollm3"),
    _QWEN3,
    replace(_QWEN3, model_type="gemma2", one_basis=_POST_NORMS, full_width=_SCALED, ffn_norm=_FFN_NORM),
    replace(_QWEN3, model_type="gemma3_text", one_basis=_POST_NORMS, full_width=_SCALED, ffn_norm=_FFN_NORM),
    replace(_QWEN3, model_type="olmo2", wide_norms=("q_norm", "k_norm"), one_basis=_POST_NORMS, ffn_norm=_FFN_NORM),
    Family(model_type="mistral"),
    Family(model_type="qwen2"),
    Family(
        model_type="phi3",
        qkv=("qkv_proj",),
        qkv_layout="concatenated",
        up=("gate_up_proj",),
        halves=2,
        sizes=(("self_attn.num_key_value_groups", "groups"), ("self_attn.num_key_value_heads", "kv_heads")),
    ),
    Family(
        model_type="gpt2",
        blocks="h",
        attention="attn",
        qkv=("c_attn",),
        qkv_layout="concatenated",
        out="c_proj",
        up=("c_fc",),
        down="c_proj",
        sizes=(("attn.num_heads", "heads"), ("attn.split_size", "width")),
        kv_heads_key=None,
        ffn_key="n_inner",
        plain_heads=False,
        full_width=_HEADS_FOLLOW,
        one_basis="its forward gives what leaves the last block the width of the embedding",
    ),
    Family(
        model_type="gpt_neox",
        attention="attention",
        qkv=("query_key_value",),
        qkv_layout="grouped",
        out="dense",
        up=("dense_h_to_4h",),
        down="dense_4h_to_h",
        sizes=(),
        kv_heads_key=None,
        plain_heads=False,
        full_width=_HEADS_FOLLOW,
    ),
    Family(
        model_type="opt",
        blocks="decoder.layers",
        out="out_proj",
        mlp="",
        up=("fc1",),
        down="fc2",
        sizes=(("self_attn.num_heads", "heads"),),
        kv_heads_key=None,
        ffn_key="ffn_dim",
        plain_heads=False,
        full_width=_HEADS_FOLLOW,
        norms=("self_attn_layer_norm", "final_layer_norm"),
        positions="decoder.embed_positions",
        chain=("fc1", "activation_fn", "fc2"),
    ),
    Family(
        model_type="falcon",
        blocks="h",
        attention="self_attention",
        qkv=("query_key_value",),
        qkv_layout="grouped",
        out="dense",
        up=("dense_h_to_4h",),
        down="dense_4h_to_h",
        sizes=(
            ("self_attention.num_heads", "heads"),
            ("self_attention.num_kv_heads", "kv_heads"),
            # read since transformers hands its queries, keys and values to the common attention interface
            ("self_attention.num_key_value_groups", "groups"),
        ),
        kv_heads_key="num_kv_heads",
        ffn_key="ffn_hidden_size",
        plain_heads=False,
        full_width=_HEADS_FOLLOW,
        one_basis="its residual connections come in several forms, none of which the modelling file has",
    ),
)

FAMILIES: dict[str, Family] = {family.model_type: family for family in _TABLE}


def frozen_heads(config: Any) -> str | None:
    """Why heads must stay in a model of this config, or None."""
    if getattr(config, "alibi", False):
        return "ALiBi gives every head a slope by its position, so heads can't leave"
    if config.model_type == "gpt2" and getattr(config, "add_cross_attention", False):
        return "cross-attention shares the heads"
    return None


def is_post_norm(config: Any) -> bool:
    """Whether a norm follows every residual sum."""
    return getattr(config, "do_layer_norm_before", True) is False


def summed(config: Any, family: Family) -> tuple[str, float]:
    """What the FFN's output passes on its way out of a block: (a norm behind it or behind the sum or "", a factor)."""
    norm = family.norms[1] if is_post_norm(config) else family.ffn_norm
    return norm, float(getattr(config, family.factor_key)) if family.factor_key else 1.0


def frozen_hidden(config: Any, family: Family) -> str | None:
    """Why the hidden states of a model of this config must stay in one basis, or None."""
    if family.one_basis:
        return family.one_basis
    if is_post_norm(config):
        return "its norms follow the residual sums"
    if getattr(config, "word_embed_proj_dim", config.hidden_size) != config.hidden_size:
        return "a projection stands between its embedding and its blocks"
    if getattr(config, "add_cross_attention", False):
        return "a cross-attention has a residual connection of its own"
    return None


def frozen_width(config: Any) -> str | None:
    """Why hidden channels must stay in a model of this config, or None."""
    if "rotated" in (getattr(config, "secateur", None) or {}):
        return "every sub-layer reads them in a basis of its own"
    return FAMILIES[config.model_type].full_width or None


def frozen_layers(config: Any) -> str | None:
    """Why whole blocks must stay in a model of this config, or None."""
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        return "attention is scaled by the index of the layer, which removal would shift"
    return None
