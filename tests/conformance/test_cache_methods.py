"""What every method that compresses the KV cache must do: a new one is tested before its author begins."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache
from transformers.models.falcon import modeling_falcon

import secateur as sc
from cache_prompts import Words
from cache_reference import as_dense, generate, reference_logits, small_spec
from families import FAMILY_CONFIGS, make_tiny, tiny_ids
from secateur.cache.layer import CompressedLayer
from secateur.errors import UnsupportedModelError
from secateur.methods import get_method, list_methods

METHODS = list_methods(object="kv_cache")
# one spec for every way of storing what stays, each with all that a family may bring
STORAGES = ["snapkv:0.5,window=4,kernel=3", "adakv(knorm:0.5)", "think:0.5,recent=4", "mustafar:0.5,window=4,block=4"]
# and one that reads the prompt again
STORAGES += ["kvzip:0.5,sinks=2"]
# what has full attention in some layers only, or a dimension that the table leaves to the class
CHANGES = {
    "mistral": {"sliding_window": None},
    "gemma2": {"layer_types": ["sliding_attention", "full_attention", "full_attention"]},
    "gemma3": {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
}
IDS = tiny_ids(windows=2, length=24)
MASK = torch.ones_like(IDS)
MASK[1, :5] = 0


def made(spec, model):
    return sc.compressed_cache(spec, model, tokenizer=Words())


def filled(model, spec, ids=IDS, mask=MASK):
    """A cache behind the prompt, and the logits of the prompt; a plain cache without a spec."""
    cache = made(spec, model) if spec else DynamicCache(config=model.config)
    positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, position_ids=positions, cache=cache).logits
    return cache, logits


@pytest.fixture(scope="module")
def llama():
    return make_tiny("llama")


@pytest.fixture(scope="module")
def dense(llama):
    return generate(llama, IDS, MASK)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_removed_is_bit_identical(method, llama, dense):
    cache = made(f"{method}:0", llama)
    found = generate(llama, IDS, MASK, cache=cache)
    assert torch.equal(found.tokens, dense.tokens) and torch.equal(found.logits, dense.logits)
    report = cache.report()
    assert report["bytes_dense"] == report["bytes_ideal"]
    # what evicts while it decodes remembers queries
    assert report["bytes_held"] == report["bytes_dense"] or not cache.methods[0].is_identity


@pytest.mark.parametrize("method", METHODS)
def test_the_prompt_is_read_dense_and_what_follows_sees_what_stays(method, llama, dense):
    spec = small_spec(method)
    cache, prompt = filled(llama, spec)
    assert torch.equal(prompt, filled(llama, None)[1])
    found = generate(llama, IDS, MASK, cache=made(spec, llama))
    # mustafar goes on to prune while it decodes; its own test has a reference for that
    steps = 1 if get_method(method).stage == "elements" else 5
    expected = reference_logits(llama, cache, found.tokens[:, :steps], MASK)
    assert torch.allclose(found.logits[:, 1 : steps + 1], expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(expected.argmax(dim=-1), found.tokens[:, 1 : steps + 1])
    assert not torch.allclose(found.logits[:, 1], dense.logits[:, 1], atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_bytes_are_really_freed_and_counted(method, llama):
    cache, _ = filled(llama, small_spec(method))
    report = cache.report()
    held = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for layer in cache.layers
        for tensor in layer.tensors().values()
    }
    assert report["bytes_held"] == sum(held.values()) < report["bytes_dense"]
    assert report["bytes_ideal"] <= report["bytes_held"]
    assert report["tokens"] == 24 and str(report).startswith("24 tokens")


@pytest.mark.parametrize("method", METHODS)
def test_what_stays_is_what_was_there(method, llama):
    cache, _ = filled(llama, small_spec(method))
    whole, _ = filled(llama, None)
    moved = "rotation" in method
    for layer, dense_layer in zip(cache.layers, whole.layers, strict=True):
        keys, values, there = as_dense(layer)
        for mine, theirs in ((keys, dense_layer.keys), (values, dense_layer.values)):
            kept = there[..., None] & (mine != 0)
            assert (mine is keys and moved) or torch.equal(mine[kept], theirs[kept])
        assert bool(there.any(dim=-1).any(dim=-1).all())


@pytest.mark.parametrize("method", METHODS)
def test_a_padded_batch_equals_one_by_one(method, llama):
    spec = small_spec(method)
    together = generate(llama, IDS, MASK, cache=made(spec, llama))
    for b, padding in enumerate((0, 5)):
        alone = generate(llama, IDS[b : b + 1, padding:], cache=made(spec, llama))
        assert torch.equal(alone.tokens[0], together.tokens[b])
        assert torch.allclose(alone.logits[0], together.logits[b], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_twice(method, llama):
    first, second = (filled(llama, small_spec(method))[0] for _ in range(2))
    for mine, theirs in zip(first.layers, second.layers, strict=True):
        assert all(torch.equal(t, theirs.tensors()[n]) for n, t in mine.tensors().items())


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_every_family(family):
    model = make_tiny(family, **CHANGES.get(family, {}))
    if "falcon" in family and not hasattr(modeling_falcon, "ALL_ATTENTION_FUNCTIONS"):
        # before transformers 5.25 its attention does not call the common interface, so the cache is refused
        with pytest.raises(UnsupportedModelError, match="FalconAttention"):
            filled(model, STORAGES[0])
        return
    if getattr(model.config, "alibi", False):
        with pytest.raises(UnsupportedModelError, match="ALiBi"):
            filled(model, STORAGES[0])
        return
    for implementation in ("sdpa", "eager") if family != "gemma2" else ("eager",):
        model.set_attn_implementation(implementation)
        plain = filled(model, None)[1]
        for spec in STORAGES:
            cache, prompt = filled(model, spec)
            assert torch.equal(prompt, plain)
            assert any(isinstance(layer, CompressedLayer) for layer in cache.layers)
            found = generate(model, IDS, MASK, new=3, cache=made(spec, model))
            expected = reference_logits(model, cache, found.tokens[:, :1], MASK)
            assert torch.allclose(found.logits[:, 1:2], expected, atol=2e-4, rtol=1e-3), (spec, implementation)
