"""Rotary embeddings and attention implementations beyond the plain ones."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers.modeling_utils import AttentionInterface

import secateur as sc
from cache_reference import generate
from families import FAMILY_CONFIGS, GQA, SPECIAL, make_tiny, tiny_ids
from secateur.cache.layer import CompressedLayer

IDS = tiny_ids(windows=2, length=24)
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
VARIANTS = {
    "llama": {},
    "qwen3": {},
    "phi3": {},
    "gpt_neox": {},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}},
    "llama3": {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 16}},
    "yarn": {"rope_parameters": YARN},
}


class Recording(CompressedLayer):
    """Keeps the queries and how they turn."""

    def compress(self, query, mask, call, arguments):
        self.rope, self.query = call.rope(), query
        super().compress(query, mask, call, arguments)


@pytest.mark.parametrize("name", VARIANTS)
def test_queries_are_turned_back_to_where_they_came_from(name):
    model = make_tiny(name if name in FAMILY_CONFIGS else "llama", **VARIANTS[name])
    cache = sc.compressed_cache("key_rerotation(expected_attention:0.5)", model)
    cache.layers = [Recording(layer.index, layer.layers, layer.steps) for layer in cache.layers]
    before = {}
    first = next(m for m in model.modules() if type(m).__name__.endswith("Attention"))
    projection = next(m for n, m in first.named_modules() if n in ("q_norm", "q_proj", "qkv_proj", "query_key_value"))
    projection = getattr(first, "q_norm", projection)
    handle = projection.register_forward_hook(lambda m, a, out: before.update(queries=out))
    with torch.no_grad():
        model(IDS, cache=cache)
    handle.remove()
    layer = cache.layers[0]
    raw = before["queries"].reshape(2, 24, -1)[..., : 4 * layer.query.shape[-1]]
    if name == "gpt_neox":  # query, key and value of a head lie together
        raw = before["queries"].reshape(2, 24, 4, -1)[..., : layer.query.shape[-1]].flatten(2)
    width = 2 * len(layer.rope.frequencies)
    turned = layer.rope.turned(layer.query, -torch.arange(24))
    turned = torch.cat([turned[..., :width] / layer.rope.scale, turned[..., width:]], dim=-1)
    assert torch.allclose(turned.transpose(1, 2).flatten(2), raw, atol=1e-5)
    assert (layer.rope.scale != 1) == (name == "yarn") and (width < layer.query.shape[-1]) == (name == "gpt_neox")


@pytest.mark.parametrize("name", ["Exaone4", "Afmoe", "Cohere2", "Cohere2Moe", "SmolLM3"])
def test_layers_that_dont_turn_are_left_as_they_are(name):
    if not hasattr(transformers, f"{name}Config"):
        pytest.skip(f"this version of transformers has no {name}")
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    changes = {"no_rope_layers": [1, 0, 1]} if name == "SmolLM3" else {"sliding_window": 8, "layer_types": types}
    config = getattr(transformers, f"{name}Config")(**{**SPECIAL, **GQA, **changes})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    held = []
    for spec in ("streaming_llm:0.5", "key_rerotation(streaming_llm:0.5)"):
        cache = sc.compressed_cache(spec, model)
        with torch.no_grad():
            model(IDS, cache=cache)
        held.append(cache.layers[1].keys)
    assert held[0].shape[2] == 12 and torch.equal(*held)


@pytest.mark.parametrize("family", [f for f in FAMILY_CONFIGS if "falcon" not in f and f != "mistral"])
def test_every_family_says_how_it_turns(family):
    kinds = {"layer_types": ["full_attention", "sliding_attention", "full_attention"]} if "gemma" in family else {}
    model = make_tiny(family, **kinds)
    model.set_attn_implementation("eager")
    cache = sc.compressed_cache("key_rerotation(expected_attention:0.5)", model)
    with torch.no_grad():
        model(IDS, cache=cache)
    assert cache.report()["bytes_held"] < cache.report()["bytes_dense"]


def like_flash(module, query, key, value, attention_mask, scaling=None, **arguments):
    """What a flash kernel does: causal from the end, and a mask of padding [B, text]."""
    new, text = query.shape[2], key.shape[2]
    seen = torch.ones(new, text, dtype=torch.bool).tril(text - new)[None, None]
    if attention_mask is not None:
        assert attention_mask.dim() == 2 and attention_mask.shape[1] == text
        # a query on padding sees nothing, and gives zeros
        seen = seen & attention_mask[:, None, None].bool() | torch.eye(new, text, dtype=torch.bool)
    keys, values = (side.repeat_interleave(query.shape[1] // side.shape[1], dim=1) for side in (key, value))
    out = torch.nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=seen, scale=scaling)
    return out.transpose(1, 2), None


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("spec", ["knorm:0.5", "adakv(knorm:0.5)", "think:0.5,recent=4"])
def test_flash_kernels_take_what_they_can(spec, padding, monkeypatch):
    model, mask = make_tiny("llama"), torch.ones_like(IDS)
    mask[1, :padding] = 0
    expected = generate(model, IDS, mask, new=4, cache=sc.compressed_cache(spec, model))
    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_2", like_flash)
    model.config._attn_implementation_internal = "flash_attention_2"
    found = generate(model, IDS, mask, new=4, cache=sc.compressed_cache(spec, model))
    assert torch.allclose(found.logits, expected.logits, atol=1e-4)
    more, cache = tiny_ids(windows=2, length=3, seed=5), sc.compressed_cache(spec, model)
    grown = torch.cat([mask, torch.ones(2, 3, dtype=mask.dtype)], dim=-1)
    logits = {}
    for kind in ("flash_attention_2", "sdpa"):
        model.config._attn_implementation_internal = kind
        cache = sc.compressed_cache(spec, model)
        with torch.no_grad():
            model(IDS, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), cache=cache)
            out = model(more, attention_mask=grown, position_ids=grown.cumsum(-1)[:, -3:] - 1, cache=cache)
        logits[kind] = out.logits
    assert torch.allclose(*logits.values(), atol=1e-4)
