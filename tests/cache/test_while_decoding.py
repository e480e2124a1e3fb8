"""Budgets that hold while a model decodes, beside a slow model that hides what was evicted and forgets nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import secateur as sc
from cache_prompts import kept, random_prompt
from cache_reference import generate
from decoding_reference import slow
from families import make_tiny, tiny_ids
from secateur.errors import OptionError, UsageError
from secateur.methods.cachespec import parse_cache_spec

IDS = tiny_ids(windows=1, length=20)
NEW = 10
BUDGET = 9


@pytest.fixture(scope="module")
def model():
    return make_tiny("llama")


def h2o(module, there: Tensor) -> Tensor:
    received = module.rows.sum(dim=1).unflatten(0, (len(there), -1)).mean(dim=1)
    stays = torch.zeros_like(there)
    for head, tokens in enumerate(there):
        left = tokens.nonzero()[:, 0]
        if len(left) <= BUDGET:
            stays[head, left] = True
            continue
        recent, older = left[-(BUDGET // 2) :], left[: -(BUDGET // 2)]
        best = received[head, older].argsort(descending=True)[: BUDGET - BUDGET // 2]
        stays[head, recent] = stays[head, older[best]] = True
    return stays


def tova(module, there: Tensor) -> Tensor:
    seen = module.rows[:, -1].mean(dim=0)
    left = there[0].nonzero()[:, 0]
    stays = torch.zeros_like(there)
    stays[:, left[seen[left].argsort(descending=True)[:BUDGET]]] = True
    return stays


def streaming(module, there: Tensor) -> Tensor:
    tokens = there.shape[1]
    stays = torch.zeros_like(there)
    stays[:, :4] = stays[:, max(0, tokens - BUDGET + 4) :] = True
    return stays


@pytest.mark.parametrize(
    ("spec", "rule", "turned"),
    [
        (f"h2o:budget={BUDGET}", h2o, False),
        (f"tova:budget={BUDGET}", tova, False),
        (f"streaming_llm:budget={BUDGET}", streaming, False),
        (f"key_rerotation(streaming_llm:budget={BUDGET})", streaming, True),
    ],
)
def test_greedy_generation_equals_a_reference_that_hides_what_was_evicted(model, spec, rule, turned):
    cache = sc.compressed_cache(spec, model)
    found = generate(model, IDS, new=NEW, cache=cache)
    assert torch.equal(found.tokens[0], slow(model, IDS, NEW, rule, turned=turned))
    for entry in cache.report()["layers"]:
        assert entry["tokens_kept"] == [[BUDGET, BUDGET]]
    dense = generate(model, IDS, new=NEW)
    assert not torch.equal(found.tokens, dense.tokens)


def test_a_wrapper_evicts_every_few_tokens(model):
    cache = sc.compressed_cache(f"decoding(h2o):budget={BUDGET},every=3", model)
    lengths = []
    with torch.no_grad():
        model(IDS, cache=cache)
        for t in range(9):
            model(IDS[:, t : t + 1], cache=cache)
            lengths.append(cache.layers[0].keys.shape[2])
    assert lengths == [21, 22, BUDGET, BUDGET + 1, BUDGET + 2, BUDGET, BUDGET + 1, BUDGET + 2, BUDGET]
    found = generate(model, IDS, new=NEW, cache=sc.compressed_cache(f"decoding(h2o):budget={BUDGET},every=3", model))
    assert torch.equal(found.tokens[0], slow(model, IDS, NEW, h2o, every=3, start=1))


@pytest.mark.parametrize("inner", ["knorm", "snapkv:window=4,kernel=3", "expected_attention", "keydiff", "lagkv:lag=4"])
def test_a_wrapper_takes_the_scores_of_any_method(model, inner):
    spec = f"decoding({inner}):0.5,budget={BUDGET},every=2,queries=16"
    both = tiny_ids(windows=2, length=20)
    mask = torch.ones_like(both)
    mask[1, :5] = 0
    cache = sc.compressed_cache(spec, model)
    together = generate(model, both, mask, new=NEW, cache=cache)
    for b, padding in enumerate((0, 5)):
        alone = generate(model, both[b : b + 1, padding:], new=NEW, cache=sc.compressed_cache(spec, model))
        assert torch.equal(alone.tokens[0], together.tokens[b])
    assert cache.layers[0].keys.shape[2] in (BUDGET, BUDGET + 1)
    assert cache.report()["bytes_held"] == sum(
        t.untyped_storage().nbytes() for layer in cache.layers for t in layer.tensors().values()
    )


def test_expected_attention_of_a_few_queries_keeps_the_sinks(model):
    for queries in (1, 4, 16):
        cache = sc.compressed_cache(f"decoding(expected_attention):budget={BUDGET},every=2,queries={queries}", model)
        generate(model, IDS, new=NEW, cache=cache)
        for layer in cache.layers:
            assert layer.kept[0, :, :4].tolist() == [[0, 1, 2, 3]] * 2


@pytest.mark.parametrize("spec", [f"h2o:budget={BUDGET}", f"tova:budget={BUDGET}", f"streaming_llm:budget={BUDGET}"])
def test_a_padded_batch_equals_one_by_one(model, spec):
    both = tiny_ids(windows=2, length=20)
    mask = torch.ones_like(both)
    mask[1, :16] = 0  # shorter than the budget at first
    together = generate(model, both, mask, new=NEW, cache=sc.compressed_cache(spec, model))
    for b, padding in enumerate((0, 16)):
        alone = generate(model, both[b : b + 1, padding:], new=NEW, cache=sc.compressed_cache(spec, model))
        assert torch.equal(alone.tokens[0], together.tokens[b])
        assert torch.allclose(alone.logits[0], together.logits[b], atol=1e-4)


@pytest.mark.parametrize(
    ("spec", "sparsity"),
    [
        ("key_rerotation(decoding(keydiff):budget=9)", 0.0),
        ("key_rerotation(decoding(keydiff):0.25,budget=9)", 0.25),
        ("key_rerotation(decoding(keydiff):budget=9):0.25", 0.25),
        ("key_rerotation(knorm)", 0.5),
    ],
)
def test_a_prompt_loses_what_the_wrapped_method_says(spec, sparsity):
    outer = parse_cache_spec(spec)[0]
    assert (outer.sparsity, outer.inner.sparsity) == (sparsity, sparsity)


def test_a_budget_above_the_text_is_the_dense_model(model):
    dense = generate(model, IDS, new=NEW)
    for spec in ("h2o:budget=99", "tova:budget=99", "streaming_llm:budget=99", "decoding(snapkv:window=4):budget=99"):
        found = generate(model, IDS, new=NEW, cache=sc.compressed_cache(spec, model))
        assert torch.equal(found.logits, dense.logits)


def test_sums_are_carried_over_steps():
    method, prompt = parse_cache_spec("h2o:budget=99")[0], random_prompt(tokens=12)
    whole = method.carry(prompt)
    sides = {name: getattr(prompt, name)[:, :, :10] for name in ("keys", "values", "queries")}
    first = replace(prompt, **sides)
    then = replace(prompt, queries=prompt.queries[:, :, 10:], carried=method.carry(first))
    assert torch.allclose(method.carry(then), whole, atol=1e-6)
    assert torch.allclose(whole.sum(dim=-1), torch.full((1, 2), 12.0))
    assert kept(method.keep(replace(prompt, carried=whole))) == [list(range(12))] * 2


def test_tova_may_evict_the_newest_token():
    prompt = random_prompt(tokens=6)
    prompt.queries[:, :, -1] = 1
    prompt.keys[:, :, -1] = -10
    assert 5 not in kept(parse_cache_spec("tova:budget=3")[0].keep(prompt))[0]
    assert 5 in kept(parse_cache_spec("tova:0.5")[0].keep(prompt))[0]


def test_beams_and_copies_follow_their_own_past(model):
    for spec in (f"h2o:budget={BUDGET}", f"decoding(snapkv:window=4):budget={BUDGET},every=2"):
        arguments = {"max_new_tokens": 6, "do_sample": False, "num_beams": 3, "attention_mask": torch.ones_like(IDS)}
        cache = sc.compressed_cache(spec, model)
        out = model.generate(IDS, cache=cache, return_dict_in_generate=True, output_scores=True, **arguments)
        alone, tokens = sc.compressed_cache(spec, model), out.sequences[0, 20:]
        with torch.no_grad():
            logits = [model(IDS, cache=alone).logits[:, -1:]]
            logits += [model(tokens[None, t : t + 1], cache=alone).logits for t in range(len(tokens) - 1)]
        scores = torch.cat(logits, dim=1)[0].log_softmax(-1).gather(-1, tokens[:, None]).sum()
        assert out.sequences_scores[0] == pytest.approx(float(scores) / len(tokens), abs=1e-4)


def test_what_left_meanwhile_cant_be_cropped(model):
    cache = sc.compressed_cache(f"decoding(keydiff):budget={BUDGET},every=4", model)
    with torch.no_grad():
        model(IDS, cache=cache)
        model(IDS[:, :4], cache=cache)
        model(IDS[:, :2], cache=cache)
    with pytest.raises(UsageError, match="at most the 2 tokens that came after that can be cropped, got 3"):
        cache.crop(-3)
    cache.crop(-2)
    assert cache.get_seq_length() == 24 and cache.layers[0].keys.shape[2] == BUDGET
    adding = sc.compressed_cache(f"h2o:budget={BUDGET}", model)
    with torch.no_grad():
        model(IDS[:, :4], cache=adding)
    with pytest.raises(UsageError, match="adds up attention"):
        adding.crop(-1)


@pytest.mark.parametrize(
    ("spec", "error", "words"),
    [
        ("h2o:0.5,budget=64", UsageError, "as a budget or as a sparsity"),
        ("key_rerotation(streaming_llm:budget=64):0.5", UsageError, "as a budget or as a sparsity"),
        ("h2o:budget=-1", OptionError, r"budget must lie in \[0, inf\)"),
        ("streaming_llm:budget=4", OptionError, "more than the 4 sinks"),
        ("adakv(h2o:budget=64)", OptionError, "a fraction of the prompt"),
        ("decoding(adakv)", OptionError, "equally many tokens"),
        ("decoding(per_layer_kv)", OptionError, "equally many tokens"),
        ("decoding(decoding)", OptionError, "a fraction of the prompt"),
        ("decoding(snapkv:window=64):budget=64", OptionError, "more than the 64 tokens that"),
        ("decoding(keydiff):every=0", OptionError, "every must lie in"),
        ("h2o:budget=64+think:0.4", UsageError, "think removes channels"),
        ("decoding(keydiff)+mustafar:0.5", UsageError, "mustafar removes elements"),
    ],
)
def test_what_cant_be(spec, error, words):
    with pytest.raises(error, match=words) as caught:
        parse_cache_spec(spec)
    assert "\n" not in str(caught.value)


def test_a_ragged_batch_says_that_it_cant_go_on(model):
    both, mask = tiny_ids(windows=2, length=20), torch.ones(2, 20, dtype=torch.long)
    mask[1, :5] = 0
    cache = sc.compressed_cache("decoding(chunkkv(streaming_llm:sinks=0):length=8):0.5,budget=4,every=1", model)
    with torch.no_grad():
        model(both, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), cache=cache)
        assert cache.layers[0].store is not None
        with pytest.raises(UsageError, match="one sequence at a time"):
            model(both[:, :1], attention_mask=torch.ones(2, 21), cache=cache)
