"""What a cache takes is known from shapes: the same number as the report's of a cache that is there."""

from __future__ import annotations

import copy

import pytest
import torch

import secateur as sc
from cache_prompts import Words
from cache_reference import as_dense
from families import make_tiny, tiny_ids
from secateur.cache.prompts import read_prompt
from secateur.cache.sizes import CacheShape, LayerShape, _stored, cache_shape, predicted_bytes
from secateur.errors import UsageError
from secateur.methods.cachespec import at_sparsity, parse_cache_spec, split_presses

SPECS = [
    "knorm:0.5",
    "adakv(knorm:0.5)",
    "pyramidkv:0.5,window=16,kernel=5",
    "think:0.5",
    "think:0.3,target=value",
    "mustafar:k=0.7,v=0,block=1",
    "knorm:0.3+mustafar:0.5",
    "knorm:0.75+think:0.5",
]


@pytest.fixture(scope="module")
def model():
    return make_tiny("llama", max_position_embeddings=1024)


@pytest.mark.parametrize("spec", SPECS)
def test_predicted_is_held(model, spec):
    ids = tiny_ids(windows=2, length=700)
    cache = sc.compressed_cache(spec, model)
    with torch.no_grad():
        model(ids, cache=cache)
    report, shape = cache.report(), cache_shape(model)
    assert shape.dense_bytes(700, batch=2) == report["bytes_dense"]
    assert predicted_bytes(parse_cache_spec(spec), shape, 700, batch=2) == report["bytes_held"]


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "qwen3", "phi3"])
def test_shapes_need_no_weights(family):
    model = make_tiny(family)
    shape = cache_shape(model)
    assert shape == cache_shape(copy.deepcopy(model).to("meta"))
    assert [layer.window for layer in shape.layers] == ([8, None, 8] if family == "gemma2" else [None] * 3)


def test_windows_are_small_already():
    shape = CacheShape((LayerShape(2, 8, 8, window=16), LayerShape(2, 8, 8)), torch.float16)
    assert shape.dense_bytes(100) == 2 * 16 * 2 * (16 + 100)
    held = predicted_bytes(parse_cache_spec("knorm:0.5"), shape, 100)
    assert held == 2 * 16 * 2 * 16 + 2 * 50 * (16 * 2 + 4)
    assert shape.largest_layer(100) == 2 * 16 * 2 * 100


def test_heads_of_different_lengths_differ_by_their_last_tiles(model):
    spec = "adakv(knorm:0.5)+mustafar:0.5,block=1"
    cache = sc.compressed_cache(spec, model)
    with torch.no_grad():
        model(tiny_ids(windows=2, length=700), cache=cache)
    report, shape = cache.report(), cache_shape(model)
    heads = torch.tensor([layer["tokens_kept"] for layer in report["layers"]])
    assert bool((heads != heads[0, 0, 0]).any())
    # of every head: the bits of one block of keys, 8 wide, and of values, padded to 32, each with its start and count
    tile = 64 * 8 // 8 + 64 * 32 // 8 + 2 * 16
    held = predicted_bytes(parse_cache_spec(spec), shape, 700, batch=2)
    assert 0 < abs(held - report["bytes_held"]) <= heads.numel() * tile


@pytest.mark.parametrize("block", [1, 96])
def test_long_prompts_lie_on_the_line(monkeypatch, block):
    shape = LayerShape(1, 8, 8)
    steps = f"knorm:0.5+mustafar:0.5,block={block}"
    from secateur.cache import sizes
    from secateur.cache.layer import Steps

    asked = Steps.of(parse_cache_spec(steps))
    whole = _stored(asked, 3000, shape, 6000, torch.float32)
    monkeypatch.setattr(sizes, "MOST_ROWS", 1000)
    assert _stored(asked, 3000, shape, 6000, torch.float32) == whole


def test_a_prompt_that_is_read_once_gives_the_same_caches(model):
    ids, more = tiny_ids(windows=1, length=60), tiny_ids(windows=1, length=3, seed=5)
    read = read_prompt(model, ids, Words())
    # one that decides on all layers together, and one that goes on evicting, among them
    more_specs = ("kvzip:0.5,sinks=2", "h2o:budget=20", "kvzip:0.5,sinks=2+mustafar:0.5,window=4,block=4")
    for spec in (
        *more_specs,
        "knorm:0",
        "adakv(knorm:0.5)+mustafar:0.5,window=4,block=4",
        "snapkv:0.5,window=8+think:0.5,recent=4",
    ):
        caches = [sc.compressed_cache(spec, model, tokenizer=Words()), read.compressed(parse_cache_spec(spec))]
        with torch.no_grad():
            model(ids, cache=caches[0])
            logits = [model(more, cache=cache).logits for cache in caches]
        assert torch.equal(*logits), spec
        assert caches[0].report() == caches[1].report()
        assert all(
            torch.equal(a, b)
            for pair in zip(*(map(as_dense, c.layers) for c in caches), strict=True)
            for a, b in zip(*pair, strict=True)
        )


@pytest.mark.parametrize(
    ("press", "spec"),
    [
        ("snapkv", "snapkv:0.5"),
        ("snapkv:window=32,kernel=7", "snapkv:0.5,window=32,kernel=7"),
        ("adakv(snapkv:window=32)", "adakv(snapkv:window=32):0.5"),
        ("snapkv + think:0.4", "snapkv:0.5+think:0.4"),
        ("snapkv+mustafar:k=0.7", "snapkv:0.5+mustafar:0.5,k=0.7"),
    ],
)
def test_a_fraction_is_put_where_there_is_none(press, spec):
    assert at_sparsity(press, 0.5) == spec
    with pytest.raises(UsageError, match="says itself how much is removed"):
        at_sparsity(spec, 0.3)


def test_no_fraction_is_put_where_it_would_say_nothing():
    for press in (
        "mustafar:k=0.7,v=0.2",
        "kvzap:threshold=-4",
        "h2o:budget=64",
        "key_rerotation(h2o:budget=64)",
        "per_layer_kv(snapkv):sparsities=0.2/0.4/0.6",
        "key_rerotation(per_layer_kv(knorm):sparsities=0.2/0.4/0.6)",
    ):
        with pytest.raises(UsageError, match="says itself how much is removed"):
            at_sparsity(press, 0.5)
    assert at_sparsity("knorm+mustafar:k=0.7,v=0.2", 0.5) == "knorm:0.5+mustafar:k=0.7,v=0.2"
    assert at_sparsity("per_layer_kv(snapkv)", 0.5) == "per_layer_kv(snapkv):0.5"
    (wrapped,) = parse_cache_spec("adakv(per_layer_kv(knorm):sparsities=0.2/0.4/0.6)")
    assert not wrapped.by_sparsity


def test_presses_are_split_at_commas_that_are_not_options():
    text = "snapkv,adakv(snapkv:window=32,kernel=7),mustafar:k=0.7,v=0.7,snapkv+think:0.4,think:window=8"
    assert split_presses(text) == [
        "snapkv",
        "adakv(snapkv:window=32,kernel=7)",
        "mustafar:k=0.7,v=0.7",
        "snapkv+think:0.4",
        "think:window=8",
    ]
    with pytest.raises(UsageError, match="joined by ','"):
        split_presses("snapkv,,think")
