"""A compressed cache in use: beams, turns, crops, copies, contexts, and what it refuses."""

from __future__ import annotations

import copy
import inspect
from itertools import pairwise

import pytest
import torch
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, QuantizedCache, StaticCache, pipeline

import secateur as sc
from cache_prompts import Words
from cache_reference import as_dense, generate, reference_logits
from families import make_tiny, tiny_ids
from secateur.cache import CompressedCache
from secateur.cache.hooks import attach, cache_argument
from secateur.cache.layer import CompressedLayer
from secateur.errors import NonFiniteError, OptionError, UnknownMethodError, UnsupportedModelError, UsageError
from secateur.methods.cachespec import parse_cache_spec

# one for every way of storing what stays
SPECS = [
    "knorm:0.5",
    "adakv(knorm:0.5)",
    "think:0.5,recent=4",
    "mustafar:0.5,window=4,block=4",
    "adakv(knorm:0.5)+mustafar:0.7,window=2,block=4",
    "knorm:0.5+think:0.5,recent=4",
]
IDS = tiny_ids(windows=2, length=24)
WHOLE = torch.ones_like(IDS)


@pytest.fixture(scope="module")
def model():
    return make_tiny("llama")


def feed(model, cache, ids):
    with torch.no_grad():
        return model(ids, cache=cache).logits


def behind(model, spec, ids=IDS):
    cache = sc.compressed_cache(spec, model)
    feed(model, cache, ids)
    return cache


def held(cache):
    return [tensor for layer in cache.layers for tensor in as_dense(layer)]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(held(first), held(second), strict=True))


# -- in use ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS)
def test_several_tokens_at_a_time_are_one_after_the_other(model, spec):
    more = tiny_ids(windows=2, length=3, seed=5)
    at_once, singly = behind(model, spec), behind(model, spec)
    logits = feed(model, at_once, more)
    expected = torch.cat([feed(model, singly, more[:, t : t + 1]) for t in range(3)], dim=1)
    assert torch.allclose(logits, expected, atol=1e-4)
    assert at_once.get_seq_length() == 27


@pytest.mark.parametrize(
    ("spec", "length", "sequences"),
    [
        ("think:0.5,recent=0", 24, [0, 1]),
        ("knorm:0.5+think:0.5,recent=0", 24, [0, 1]),
        ("adakv(knorm:0.5)+mustafar:0.5,window=4,block=4", 4, [1, 1]),
        ("kvzip:0.9,sinks=0,level=head", 24, [0, 1]),
    ],
)
def test_what_is_left_may_hold_no_recent_token(model, spec, length, sequences):
    """Also where a head, or a whole layer, has lost all of its tokens."""
    ids, more = IDS[sequences, :length], tiny_ids(windows=2, length=1, seed=5)
    cache = sc.compressed_cache(spec, model, tokenizer=Words())
    feed(model, cache, ids)
    assert any(layer.keys.shape == (2, 2, 0, 8) for layer in cache.layers)
    expected = reference_logits(model, cache, more, WHOLE[:, :length])
    assert torch.allclose(feed(model, cache, more), expected, atol=1e-4)


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.bfloat16, 0.15), (torch.float16, 0.02)])
def test_half_precision_stays_what_it_is(dtype, rounding):
    model = make_tiny("llama").to(dtype)
    more = tiny_ids(windows=2, length=1, seed=5)
    for spec in SPECS:
        cache = behind(model, spec)
        expected = reference_logits(model, cache, more, WHOLE)
        logits = feed(model, cache, more)
        assert logits.dtype == dtype and torch.allclose(logits, expected, atol=rounding)
        assert all(t.dtype == dtype for n, t in cache.layers[0].tensors().items() if n.startswith("tail.k"))


def test_a_second_turn_with_padding_sees_what_stays(model):
    mask = WHOLE.clone()
    mask[1, :5] = 0
    more = tiny_ids(windows=2, length=3, seed=5)
    grown = torch.cat([mask, torch.ones(2, 3, dtype=mask.dtype)], dim=-1)
    for spec in SPECS[:3]:
        cache = sc.compressed_cache(spec, model)
        with torch.no_grad():
            model(IDS, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), cache=cache)
            expected = reference_logits(model, cache, more, mask)
            logits = model(more, attention_mask=grown, position_ids=grown.cumsum(-1)[:, -3:] - 1, cache=cache).logits
        assert torch.allclose(logits, expected, atol=1e-4)


@pytest.mark.parametrize("spec", SPECS)
def test_sequences_change_places(model, spec):
    for change in ("reorder_cache", "batch_select_indices"):
        cache = behind(model, spec)
        getattr(cache, change)(torch.tensor([1, 0, 1]))
        assert same(cache, behind(model, spec, IDS[[1, 0, 1]]))
        more = tiny_ids(windows=3, length=1, seed=5)
        assert torch.allclose(
            feed(model, cache, more), feed(model, behind(model, spec, IDS[[1, 0, 1]]), more), atol=1e-5
        )
    cache = behind(model, spec)
    cache.batch_repeat_interleave(2)
    assert same(cache, behind(model, spec, IDS.repeat_interleave(2, dim=0)))
    cache.batch_select_indices(torch.tensor([True, False, False, True]))
    assert same(cache, behind(model, spec))


def test_beams_are_those_of_the_dense_cache_where_nothing_leaves(model):
    arguments = {"num_beams": 3, "max_new_tokens": 5, "do_sample": False, "attention_mask": WHOLE}
    dense = model.generate(IDS, **arguments)
    assert torch.equal(model.generate(IDS, cache=sc.compressed_cache("knorm:0", model), **arguments), dense)


@pytest.mark.parametrize("spec", SPECS)
def test_beams_follow_their_own_past(model, spec):
    arguments = {"max_new_tokens": 5, "do_sample": False, "attention_mask": WHOLE, "num_beams": 3}
    cache = sc.compressed_cache(spec, model)
    out = model.generate(IDS, cache=cache, return_dict_in_generate=True, output_scores=True, **arguments)
    for b in range(2):
        # what was chosen scores as if it had been fed alone
        alone, tokens = behind(model, spec, IDS[b : b + 1]), out.sequences[b, 24:]
        with torch.no_grad():
            first = model(IDS[b : b + 1]).logits[:, -1:]
        logits = [first, *(feed(model, alone, tokens[None, t : t + 1]) for t in range(len(tokens) - 1))]
        scores = torch.cat(logits, dim=1)[0].log_softmax(-1).gather(-1, tokens[:, None]).sum()
        assert out.sequences_scores[b] == pytest.approx(float(scores) / len(tokens), abs=1e-4)


@pytest.mark.parametrize("spec", SPECS)
def test_what_came_after_the_prompt_can_be_taken_back(model, spec):
    more = tiny_ids(windows=2, length=9, seed=5)
    cache, other = behind(model, spec), behind(model, spec)
    feed(model, cache, more[:, :7])
    cache.crop(-4)
    assert cache.get_seq_length() == 27
    feed(model, other, more[:, :3])
    last = feed(model, cache, more[:, 7:8])
    if "mustafar" not in spec:  # what has been pruned meanwhile stays pruned
        assert torch.allclose(last, feed(model, other, more[:, 7:8]), atol=1e-5)
        assert cache.report()["layers"] == other.report()["layers"]
    cache.crop(-cache.get_seq_length())
    assert cache.get_seq_length() == 0 and not cache.layers[0].tensors()
    feed(model, cache, IDS)
    assert same(cache, behind(model, spec))


def test_a_prompt_of_which_tokens_left_cant_be_cropped(model):
    cache = behind(model, "knorm:0.5")
    feed(model, cache, IDS[:, :2])
    with pytest.raises(UsageError, match="at most the 2 tokens"):
        cache.crop(-3)
    whole = behind(model, "mustafar:0.5,window=4,block=4")
    whole.crop(-14)
    assert whole.get_seq_length() == 10 and whole.layers[0].keys.shape[2] + whole.layers[0].store.rows == 10


@pytest.mark.parametrize("spec", ["streaming_llm:budget=100", "tova:budget=100", "snapkv:0.5,window=24"])
@pytest.mark.filterwarnings("ignore:snapkv leaves a prompt")
def test_a_padded_batch_of_which_nothing_left_can_be_cropped(model, spec):
    mask = WHOLE.clone()
    mask[1, :5] = 0
    where = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = sc.compressed_cache(spec, model)
    with torch.no_grad():
        model(IDS, attention_mask=mask, position_ids=where, cache=cache)
        cache.crop(-4)
        last = {"attention_mask": mask, "position_ids": where[:, -4:]}
        again = model(IDS[:, -4:], cache=cache, **last).logits
        plain = model(IDS, attention_mask=mask, position_ids=where).logits[:, -4:]
    assert not any(layer.evicted for layer in cache.layers)
    assert torch.allclose(again, plain, atol=1e-5)


def test_a_crop_that_is_refused_leaves_all_layers_as_they_are(model):
    cache = behind(model, "per_layer_kv(knorm):sparsities=0/0.5/0")
    feed(model, cache, IDS[:, :2])
    with pytest.raises(UsageError, match="at most the 2 tokens"):
        cache.crop(-3)
    assert [layer.seen for layer in cache.layers] == [26] * 3
    feed(model, cache, IDS[:, :1])


@pytest.mark.parametrize("spec", SPECS)
def test_a_prefix_is_read_once_and_used_twice(model, spec):
    prefix = behind(model, spec)
    more = tiny_ids(windows=2, length=2, seed=5)
    copies = [copy.deepcopy(prefix) for _ in range(2)]
    assert torch.equal(feed(model, copies[0], more), feed(model, copies[1], more))
    assert prefix.get_seq_length() == 24 and same(prefix, behind(model, spec))


def test_one_cache_for_two_turns_of_generate(model):
    cache = sc.compressed_cache("knorm:0.5", model)
    first = model.generate(IDS, cache=cache, attention_mask=WHOLE, max_new_tokens=4, do_sample=False)
    longer = torch.cat([first, tiny_ids(windows=2, length=3, seed=9)], dim=1)
    second = model.generate(
        longer, cache=cache, attention_mask=torch.ones_like(longer), max_new_tokens=4, do_sample=False
    )
    assert second.shape[1] == 35 and cache.get_seq_length() == 34
    assert cache.report()["layers"][0]["tokens_kept"] == [[12 + 10] * 2] * 2


def test_the_first_tokens_may_come_one_by_one(model):
    cache = sc.compressed_cache("mustafar:0.5,window=4,block=4", model)
    for t in range(16):
        feed(model, cache, IDS[:, t : t + 1])
    layer = cache.layers[0]
    assert layer.cut == [12, 12] and bool((layer.keys[:, :, :12] == 0).any(dim=-1).all())
    assert bool((layer.keys[:, :, 12:] != 0).all())


def test_sliding_windows_are_left_alone():
    model = make_tiny("gemma2", layer_types=["sliding_attention", "full_attention", "sliding_attention"])
    model.set_attn_implementation("eager")
    cache = behind(model, "knorm:0.5")
    assert [isinstance(layer, CompressedLayer) for layer in cache.layers] == [False, True, False]
    report = cache.report()
    assert [entry["left_alone"] for entry in report["layers"]] == ["sliding window", "", "sliding window"]
    assert "sliding window" in str(report)
    with pytest.raises(UnsupportedModelError, match="nothing to compress"):
        sc.compressed_cache("knorm:0.5", make_tiny("mistral"))


def test_a_long_prompt_holds_as_little_as_it_says():
    one = {"num_attention_heads": 1, "num_key_value_heads": 1, "num_hidden_layers": 1}
    model = make_tiny("llama", head_dim=64, max_position_embeddings=4096, **one).to(torch.bfloat16)
    limits = {"think:0.5": 0.77, "mustafar:0.7": 0.48, "snapkv:0.5+mustafar:0.5": 0.36}
    for spec, limit in limits.items():
        report = behind(model, spec, tiny_ids(windows=1, length=4096)).report()
        assert report["bytes_held"] / report["bytes_dense"] <= limit


def test_a_padded_batch_stays_rectangular(model):
    mask = WHOLE.clone()
    mask[1, :5] = 0
    cache = sc.compressed_cache("knorm:0.5", model)
    with torch.no_grad():
        model(IDS, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), cache=cache)
    for layer in cache.layers:
        # 9 of 19 tokens and 3 of padding beside 12 of 24, so that the model's own attention can go on
        assert layer.store is None and layer.kept.shape == (2, 2, 12) and layer.padding == [0, 3]
        assert bool((layer.kept[1, :, :3] < 5).all()) and bool((layer.kept[1, :, 3:] >= 5).all())


@pytest.mark.parametrize("padding", [0, 21])
@pytest.mark.parametrize(
    "spec",
    [
        "adakv(knorm:0.5)+mustafar:0.7,window=8,block=1",
        "adakv(knorm:0.5)+mustafar:0.7,window=2,block=4",
        "adakv(knorm:0.5)+mustafar:0.5,window=2,block=32,direction=channel",
        "adakv(knorm:0.5)+think:0.5,recent=8",
        "chunkkv:0.5,length=7+mustafar:0.7,window=2,block=4",  # the last chunk is shorter
        "snapkv:0.5,window=16+mustafar:0.7,window=4,block=8",  # short prompts stay whole
        "snapkv:0.5,window=16+think:0.5,recent=8",
    ],
)
@pytest.mark.filterwarnings("ignore:.*as it is. its window is as long")
def test_neighbours_have_no_part_in_what_stays(model, spec, padding):
    """Neither of the prompt nor of what follows, also where heads of some sequences are equally long."""
    ids = tiny_ids(windows=3, length=24 + 12 * 6)
    paddings = (0, padding, 9)
    mask = torch.stack([(torch.arange(ids.shape[1]) >= count).long() for count in paddings])
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    together, *alone = (sc.compressed_cache(spec, model) for _ in (None, *paddings))
    for start, stop in pairwise([0, *range(24, ids.shape[1] + 1, 6)]):
        logits = _read(model, together, ids, mask, position_ids, start, stop)
        for b, count in enumerate(paddings):
            own = [x[b : b + 1, count:] for x in (ids, mask, position_ids)]
            expected = _read(model, alone[b], *own, max(0, start - count), stop - count)
            assert torch.allclose(logits[b, -expected.shape[1] :], expected[0], atol=1e-4)
            for layer, lonely in zip(together.layers, alone[b].layers, strict=True):
                for whole, part in zip(as_dense(layer), as_dense(lonely), strict=True):
                    assert torch.allclose(whole[b : b + 1, :, count:].float(), part.float(), atol=1e-5)


def _read(model, cache, ids, mask, position_ids, start, stop):
    with torch.no_grad():
        new = slice(start, stop)
        return model(ids[:, new], attention_mask=mask[:, :stop], position_ids=position_ids[:, new], cache=cache).logits


def test_heads_of_different_lengths_hold_the_bytes_of_their_budget(model):
    for entry in behind(model, "adakv(knorm:0.5)").report()["layers"]:
        assert [sum(heads) for heads in entry["tokens_kept"]] == [24, 24] and entry["tokens_kept"][0] != [12, 12]
        assert entry["bytes_ideal"] == entry["bytes_dense"] / 2
        assert entry["bytes_held"] == entry["bytes_ideal"] + 2 * 24 * 4  # int32 positions


# -- the context -------------------------------------------------------------------------------------------------------


def test_within_the_context_every_new_cache_is_compressed(model):
    with sc.compress_cache(model, "knorm:0.5") as compressing:
        found = generate(model, IDS)
        assert type(compressing.cache) is CompressedCache
        assert compressing.report()["bytes_held"] < compressing.report()["bytes_dense"]
        first = compressing.cache
        with torch.no_grad():
            model(IDS, use_cache=False)
        assert compressing.cache is first
        given = sc.compressed_cache("knorm:0", model)
        feed(model, given, IDS)
        assert compressing.cache is first
        feed(model, DynamicCache(config=model.config), IDS)
        assert compressing.cache is not first
    expected = generate(model, IDS, cache=sc.compressed_cache("knorm:0.5", model))
    assert torch.equal(found.logits, expected.logits)
    with torch.no_grad():
        assert type(model(IDS).cache) is DynamicCache


def test_the_innermost_context_makes_the_cache(model):
    with sc.compress_cache(model, "knorm:0.5") as outer:
        with sc.compress_cache(model, "knorm:0.75") as inner:
            generate(model, IDS)
        assert outer.cache is None and inner.report()["layers"][0]["tokens_kept"][0][0] < 12
        generate(model, IDS)
        assert outer.report()["layers"][0]["tokens_kept"][0][0] >= 12


def test_pipelines(make_llama, tiny_tokenizer):
    model = make_llama()
    write = pipeline("text-generation", model=model, tokenizer=tiny_tokenizer)
    with sc.compress_cache(model, "streaming_llm:0.5") as compressing:
        write("The pruning shears cut what the tree does not need.", max_new_tokens=4, do_sample=False)
    assert compressing.report()["bytes_held"] < compressing.report()["bytes_dense"]


def test_a_cache_of_another_kind_is_refused(model):
    filled = DynamicCache(config=model.config)
    feed(model, filled, IDS)
    static = StaticCache(config=model.config, max_cache_len=64)
    with sc.compress_cache(model, "knorm:0.5") as compressing:
        with pytest.raises(UsageError, match="no cache was made yet"):
            compressing.report()
        for cache, kind in ((filled, "that isn't empty"), (static, "StaticCache")):
            with pytest.raises(UsageError, match=kind):
                feed(model, cache, IDS[:, :1])
        offloaded = DynamicCache(config=model.config)
        offloaded.offloading = True
        with pytest.raises(UsageError, match="DynamicCache that is offloaded"):
            feed(model, offloaded, IDS)
        quantized = QuantizedCache.__new__(QuantizedCache)
        with pytest.raises(UsageError, match="QuantizedCache"):
            feed(model, quantized, IDS)


def test_nothing_is_left_behind(model):
    module = model.model.layers[0].self_attn
    before = len(module._forward_hooks), len(module._forward_pre_hooks)
    cache, twin = (sc.compressed_cache("knorm:0.5", model) for _ in range(2))
    assert cache.attachment is twin.attachment is attach(model)
    feed(model, cache, IDS)
    assert model.config._attn_implementation == "sdpa"
    other = copy.deepcopy(cache)
    del cache, twin
    feed(model, other, IDS[:, :1])
    del other
    assert (len(module._forward_hooks), len(module._forward_pre_hooks)) == before


def test_an_error_inside_the_model_leaves_it_as_it_was(model):
    cache = sc.compressed_cache("knorm:0.5", model)
    with pytest.raises(RuntimeError):
        model(IDS, attention_mask=torch.ones(2, 1, 24, 7), cache=cache)
    assert model.config._attn_implementation == "sdpa"
    feed(model, sc.compressed_cache("knorm:0.5", model), IDS)


def test_the_argument_is_called_as_this_version_calls_it(model):
    assert cache_argument(model.forward) == "cache"
    assert cache_argument(lambda input_ids, past_key_values=None: None) == "past_key_values"
    assert "cache" in inspect.signature(model.forward).parameters


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "error", "words"),
    [
        ("snapkv:1.0", OptionError, r"sparsity must lie in \[0, 1\)"),
        ("snapkv:-0.1", OptionError, "sparsity must lie in"),
        ("snapkv:nan", OptionError, "sparsity must lie in"),
        ("snapkv:much", OptionError, "sparsity must be of type float"),
        ("snapkv:kernel=4", OptionError, "kernel must be odd"),
        ("snapkv:0.5,windov=3", OptionError, "did you mean 'window'"),
        ("snapvk:0.5", UnknownMethodError, "did you mean 'snapkv'"),
        ("wanda:0.5", UsageError, "doesn't work on the KV cache"),
        ("snapkv:0.5+h2o:0.5", UsageError, "snapkv and h2o both remove tokens"),
        ("think:0.4+mustafar:0.5", UsageError, "think and mustafar are alternatives"),
        ("snapkv:0.5+", UsageError, "joined by"),
        ("", UsageError, "such as"),
        ("snapkv(knorm):0.5", UsageError, "snapkv wraps no other method"),
        ("adakv(knorm:0.5):0.3", UsageError, "say the sparsity once"),
        ("adakv(knorm:0.5", UsageError, "joined by|don't match"),
        ("adakv(knorm):of=h2o", UsageError, "say once what adakv wraps"),
        ("adakv:of=think", UsageError, "think removes channels"),
        ("adakv:of=knorm:0.3", OptionError, "the sparsity is that of adakv"),
        ("block_kv(snapkv:0.5)", OptionError, "keys and values alone"),
        ("per_layer_kv:sparsities=0.5/x", OptionError, "separated by slashes"),
        ("per_layer_kv:sparsities=0.5/1", OptionError, "must lie in"),
        ("mustafar:direction=channel,block=40", OptionError, "multiple of 32"),
    ],
)
def test_a_spec_that_cant_be(spec, error, words):
    with pytest.raises(error, match=words) as caught:
        parse_cache_spec(spec)
    assert "\n" not in str(caught.value)


def test_specs_are_read_in_the_order_in_which_they_act():
    methods = parse_cache_spec(" think:0.4 + adakv(criticalkv(snapkv:0.5,window=9):first=0.3):safeguard=0.1 ")
    assert [m.name for m in methods] == ["adakv", "think"]
    outer = methods[0]
    assert (outer.sparsity, outer.safeguard, outer.inner.name, outer.inner.first) == (0.5, 0.1, "criticalkv", 0.3)
    assert (outer.inner.inner.window, outer.inner.inner.sparsity) == (9, 0.5)
    sides = parse_cache_spec("mustafar:k=0.7,v=0.2")[0]
    assert (sides.side_sparsity("keys"), sides.side_sparsity("values")) == (0.7, 0.2)


def test_a_prompt_as_short_as_the_window_stays_whole_and_says_so(model):
    for spec in ("snapkv:0.5", "think:0.5", "streaming_llm:0.5,sinks=30", "expected_attention:0.5,sinks=24"):
        with pytest.warns(UserWarning, match="leaves a prompt of 24 tokens as it is") as said:
            cache = behind(model, spec)
        assert len(said) == 1
        assert cache.report()["bytes_held"] == cache.report()["bytes_dense"]


def test_attention_weights_and_dropout_arent_dropped_in_silence():
    model = make_tiny("llama", attention_dropout=0.1)
    model.set_attn_implementation("eager")
    rectangle, ragged = behind(model, "knorm:0.5"), behind(model, "adakv(knorm:0.5)")
    with torch.no_grad():
        weights = model(IDS[:, :1], cache=rectangle, output_attentions=True).attentions
        assert weights[0].shape == (2, 4, 1, 13) and torch.allclose(weights[0].sum(-1), torch.ones(2, 4, 1))
        with pytest.raises(UsageError, match="leave output_attentions out"):
            model(IDS[:, :1], cache=ragged, output_attentions=True)
    model.train()
    with pytest.raises(UsageError, match=r"call model.eval\(\) first"):
        feed(model, behind(model, "think:0.5,recent=4"), IDS[:, :1])


def test_a_bitmap_that_doesnt_pay_says_so(model):
    with pytest.warns(UserWarning, match="less of the keys than its bitmap takes"):
        cache = behind(model, "mustafar:k=0.03,v=0,window=4,block=4")
    assert cache.report()["bytes_held"] > cache.report()["bytes_dense"]


@pytest.mark.parametrize(
    ("side", "value"), [("keys", float("nan")), ("values", float("inf")), ("queries", float("nan"))]
)
def test_what_is_no_number_is_named(side, value):
    model = make_tiny("llama")
    spec, attention = "h2o:budget=9", model.model.layers[1].self_attn
    cache = behind(model, spec)
    getattr(attention, {"keys": "k_proj", "values": "v_proj", "queries": "q_proj"}[side]).weight.data[0, 0] = value
    with pytest.raises(NonFiniteError, match=f"layer 1: {side} hold NaN"):
        behind(model, spec)
    with pytest.raises(NonFiniteError, match=f"layer 1: {side} of token 25 hold NaN"):
        feed(model, cache, IDS[:, :1])


def test_padding_on_the_right_is_refused(model):
    mask = WHOLE.clone()
    mask[0, -3:] = 0
    with pytest.raises(UnsupportedModelError, match="padding_side"), torch.no_grad():
        model(IDS, attention_mask=mask, cache=sc.compressed_cache("knorm:0.5", model))


def test_a_cache_works_in_its_own_model_only(model):
    cache, other = sc.compressed_cache("knorm:0.5", model), make_tiny("llama", seed=3)
    with pytest.raises(UsageError, match="works in the model that it was made for"):
        feed(other, cache, IDS)
    theirs = sc.compressed_cache("knorm:0.5", other)
    with pytest.raises(UsageError, match="made for another model"):
        feed(other, cache, IDS)
    feed(other, theirs, IDS)


def test_models_and_attention_that_arent_known(model):
    with pytest.raises(UsageError, match="must be one of transformers"):
        sc.compressed_cache("knorm:0.5", torch.nn.Linear(2, 2))
    model.config._attn_implementation_internal = "flex_attention"
    try:
        with pytest.raises(UnsupportedModelError, match="attn_implementation='sdpa'"):
            model.model.layers[0].self_attn(torch.zeros(1, 2, 32), cache=sc.compressed_cache("knorm:0.5", model))
    finally:
        model.config._attn_implementation_internal = "sdpa"


def test_what_needs_rotations_or_heads_and_finds_none(model):
    plain = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=96, n_positions=64)).eval()
    assert behind(plain, "expected_attention:0.5").report()["bytes_held"] > 0  # positions are learned: nothing turns
    assert behind(plain, "criticalkv(knorm:0.5)").report()["bytes_held"] > 0
    rotary = model.model.rotary_emb
    kept = rotary.inv_freq
    rotary.inv_freq = kept * 2
    try:
        cache = sc.compressed_cache("expected_attention:0.5", model)
        turned = model.model.layers[0].self_attn
        cos, sin = torch.rand(1, 8, 8), torch.rand(1, 8, 8)
        with pytest.raises(UnsupportedModelError, match="rotary embedding"), torch.no_grad():
            turned(torch.rand(1, 8, 32), position_embeddings=(cos, sin), attention_mask=None, cache=cache)
    finally:
        rotary.inv_freq = kept


def test_a_list_of_sparsities_is_as_long_as_the_model(model):
    with pytest.raises(OptionError, match="2 sparsities for a model of 3 layers"):
        behind(model, "per_layer_kv(knorm):sparsities=0.5/0.2")


def test_weights_are_pruned_by_other_methods(cli):
    run = cli("prune", "smollm2-135m", "--method", "snapkv", "--dry-run")
    assert run.code == 2 and "compressed_cache" in run.err and len(run.err.strip().splitlines()) == 1
