"""Evictions: numbers by hand, a second implementation, and sentences that are always true."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from cache_prompts import kept, prompt_of, random_prompt
from secateur.criteria.attention import causal_attention
from secateur.methods import Rope, make_method
from secateur.methods.caching import kept_tokens, top

ROPE = Rope(torch.tensor([1.0, 0.3, 0.1, 0.01]))


def test_kept_tokens_are_whole_and_at_least_one():
    assert [kept_tokens(10, r) for r in (0.0, 0.5, 0.7, 0.9, 0.99)] == [10, 5, 3, 1, 1]


def test_streaming_llm_keeps_sinks_and_the_end():
    prompt = random_prompt(tokens=10)
    assert kept(make_method("streaming_llm").keep(prompt)) == [[0, 1, 2, 3, 9]] * 2
    assert kept(make_method("streaming_llm", {"sinks": 0}).keep(prompt)) == [[5, 6, 7, 8, 9]] * 2


def test_knorm_keeps_short_keys():
    keys = torch.tensor([3.0, 1.0, 2.0, 4.0])[None, :, None] * torch.tensor([0.6, 0.8])
    assert kept(make_method("knorm").keep(prompt_of(keys))) == [[1, 2]]


def test_of_equal_scores_the_last_tokens_stay():
    assert kept(top(torch.zeros(1, 1, 5), 2)) == [[3, 4]]


# -- attention ---------------------------------------------------------------------------------------------------------


def test_h2o_by_hand_on_uniform_attention():
    prompt = prompt_of(torch.zeros(1, 3, 2))
    summed = make_method("h2o", {"recent": 0.0}).score(prompt)
    assert torch.allclose(summed[0, 0], torch.tensor([11 / 6, 5 / 6, 1 / 3]))
    normalized = make_method("h2o", {"recent": 0.0, "normalized": True}).score(prompt)
    assert torch.allclose(normalized[0, 0], torch.tensor([0.6111, 0.4167, 0.3333]), atol=1e-4)


def test_h2o_keeps_heavy_hitters_and_recent_tokens_half_and_half():
    prompt = random_prompt(tokens=20)
    summed = make_method("h2o", {"recent": 0.0}).score(prompt)
    for k, tokens in enumerate(kept(make_method("h2o").keep(prompt))):
        assert tokens[-5:] == [15, 16, 17, 18, 19]
        assert set(tokens[:-5]) == set(summed[0, k, :15].topk(5).indices.tolist())


def test_attention_in_parts_is_the_whole():
    prompt = random_prompt(tokens=11)
    whole = prompt.attention(11)
    assert torch.allclose(torch.cat(list(prompt.attention_in_parts(rows=4)), dim=2), whole, atol=1e-6)
    logits = prompt.queries @ prompt.keys.repeat_interleave(2, dim=1).mT * prompt.scaling
    mask = torch.ones(11, 11).tril().bool()
    assert torch.allclose(whole, logits.masked_fill(~mask, -math.inf).softmax(-1), atol=1e-6)


def test_softcap_squeezes_logits_before_the_softmax():
    queries, keys = torch.randn(1, 1, 2, 4) * 9, torch.randn(1, 1, 5, 4)
    capped = causal_attention(queries, keys, 1.0, softcap=2.0)
    logits = 2 * torch.tanh(queries @ keys.mT / 2)
    mask = torch.ones(2, 5).tril(3).bool()
    assert torch.allclose(capped, logits.masked_fill(~mask, -math.inf).softmax(-1), atol=1e-6)


def test_snapkv_pools_an_impulse_over_its_neighbours(monkeypatch):
    seen = torch.zeros(1, 1, 1, 9)
    seen[..., 3] = 1.0
    monkeypatch.setattr("secateur.methods.prompts.causal_attention", lambda *a: seen)
    prompt = prompt_of(torch.randn(1, 9, 4))
    score = make_method("snapkv", {"window": 1}).score(prompt)[0, 0]
    assert torch.allclose(score[:8], torch.tensor([0, 0.2, 0.2, 0.2, 0.2, 0.2, 0, 0]))
    assert score[8] == pytest.approx(1.2)
    widest = make_method("snapkv", {"window": 1, "pooling": "max", "kernel": 3}).score(prompt)[0, 0]
    assert widest[:8].tolist() == [0, 0, 1, 1, 1, 0, 0, 0]


def test_snapkv_of_one_query_ranks_like_tova():
    prompt = random_prompt(heads=1, kv_heads=1, tokens=12)
    mine = make_method("snapkv", {"window": 1, "kernel": 1}).score(prompt)
    assert torch.equal(mine.argsort(), make_method("tova").score(prompt).argsort())


def test_tova_keeps_the_same_tokens_for_every_head():
    first, second = kept(make_method("tova").keep(random_prompt(tokens=12)))
    assert first == second and 11 in first


def test_pyramid_budgets():
    def budgets(tokens, sparsity):
        method = make_method("pyramidkv", {"sparsity": sparsity})
        prompt = random_prompt(tokens=tokens, width=2)
        return [method.kept(replace(prompt, layer=layer, layers=4)) for layer in range(4)]

    # the last: r = 0.5 of 4096, whose pyramid is cut off at the top
    assert budgets(1000, 0.5) == [936, 645, 355, 64] and sum(budgets(1000, 0.5)) == 2000
    assert budgets(1000, 0.9) == [100] * 4
    assert budgets(4096, 0.5) == [3994, 2697, 1399, 102]


# -- keys --------------------------------------------------------------------------------------------------------------


def test_keydiff_by_hand_and_as_all_pairs():
    keys = torch.tensor([[[1, 0], [1, 0.1], [0, 1], [1, -0.1]]])
    score = make_method("keydiff").score(prompt_of(keys))[0, 0]
    assert torch.allclose(score, torch.tensor([-0.9484, -0.9752, -0.3172, -0.9121]), atol=1e-4)
    prompt = random_prompt(tokens=30)
    unit = F.normalize(prompt.keys, dim=-1)
    pairs = -(unit @ unit.mT).sum(dim=-1)
    mine = make_method("keydiff").score(prompt)
    assert torch.equal(mine.argsort(dim=-1), pairs.argsort(dim=-1))
    stretched = replace(prompt, keys=prompt.keys * torch.rand(1, 2, 30, 1).add(0.1))
    assert torch.allclose(make_method("keydiff").score(stretched), mine, atol=1e-5)


def test_lagkv_ranks_inside_partitions_and_protects_both_ends():
    prompt = random_prompt(tokens=4 + 3 * 8 + 5)
    score = make_method("lagkv", {"lag": 8}).score(prompt)
    assert bool((score[..., :4] == 1).all()) and bool((score[..., -13:] == 1).all())
    ranks = score[..., 4:20].unflatten(-1, (2, 8)).sort(dim=-1).values
    assert torch.equal(ranks, (torch.arange(8) / 8).expand_as(ranks))


def test_lagkv_of_a_short_prompt_keeps_order_and_constant_channels_are_no_nan():
    score = make_method("lagkv", {"lag": 8}).score(random_prompt(tokens=10))
    assert bool((score[..., 4:].diff() > 0).all()) and bool((score[..., :4] == 1).all())
    flat = make_method("lagkv", {"lag": 4}).score(prompt_of(torch.ones(1, 16, 8)))
    assert bool(torch.isfinite(flat).all())


# -- expected attention ------------------------------------------------------------------------------------------------


def test_the_gaussian_identity():
    generator = torch.Generator().manual_seed(0)
    mean, key = torch.randn(3, generator=generator).double(), torch.randn(3, generator=generator).double()
    root = torch.randn(3, 3, generator=generator).double() / 2
    drawn = mean + torch.randn(500_000, 3, generator=generator).double() @ root.T
    expected = mean @ key / math.sqrt(3) + key @ root @ root.T @ key / 6
    assert (drawn @ key / math.sqrt(3)).exp().mean() == pytest.approx(math.exp(expected), rel=0.005)


def naive_expected(prompt, future, sinks):
    """Head by head and position by position, in float64."""
    width, tokens = prompt.keys.shape[-1], prompt.tokens
    half = width // 2
    swap = torch.zeros(width, width).double()
    swap[half:, :half], swap[:half, half:] = torch.eye(half), -torch.eye(half)

    def rotation(position):
        angle = torch.cat([ROPE.frequencies.double() * position] * 2)
        return torch.diag(angle.cos()) + torch.diag(angle.sin()) @ swap

    mean_turn = sum(rotation(tokens + i) for i in range(future)) / future
    scores = []
    for k in range(2):
        found = []
        for h in (2 * k, 2 * k + 1):
            raw = [rotation(-p) @ prompt.queries[0, h, p].double() for p in range(sinks, tokens)]
            queries = torch.stack(raw)
            mean, centered = queries.mean(0), queries - queries.mean(0)
            mu, sigma = mean_turn @ mean, mean_turn @ (centered.T @ centered / len(raw)) @ mean_turn.T
            keys = prompt.keys[0, k, sinks:].double()
            found.append(
                torch.stack([key @ mu / width**0.5 + key @ sigma @ key / (2 * width) for key in keys]).softmax(0)
            )
        scores.append(sum(found) / 2 * prompt.values[0, k, sinks:].double().norm(dim=-1))
    return torch.stack(scores)


def test_expected_attention_as_its_equations():
    prompt = random_prompt(tokens=20, rope=ROPE)
    score = make_method("expected_attention", {"future": 7}).score(prompt)
    assert torch.allclose(score[0, :, 4:].double(), naive_expected(prompt, 7, 4), rtol=1e-4)
    assert bool((score[0, :, :4] > score[0, :, 4:].max()).all())


def test_expected_attention_of_one_query_is_its_softmax():
    prompt = random_prompt(tokens=12)
    same = replace(prompt, queries=prompt.queries[:, :, :1].expand(-1, -1, 12, -1))
    options = {"value_norm": False, "sinks": 0}
    score = make_method("expected_attention", options).score(same)
    logits = same.queries[:, :, 0][:, :, None] @ same.keys.repeat_interleave(2, dim=1).mT * same.scaling
    assert torch.allclose(score, same.per_kv_head(logits.softmax(-1)[:, :, 0]), atol=1e-6)


# -- wrappers ----------------------------------------------------------------------------------------------------------


class Fixed:
    """Scores that are given."""

    protected, sparsity = 0, 0.5

    def __init__(self, score):
        self.given = torch.tensor(score)[None]

    def score(self, prompt):
        return self.given

    def kept(self, prompt):
        return kept_tokens(self.given.shape[-1], 0.5)


def around(name, score, monkeypatch, **options):
    method = make_method(name, options)
    monkeypatch.setitem(method.__dict__, "inner", Fixed(score))
    return method


def test_adakv_shares_the_budget_of_the_heads(monkeypatch):
    scores = [[0.9, 0.8, 0.7, 0.6], [0.5, 0.1, 0.05, 0.01]]
    prompt = random_prompt(tokens=4)
    assert kept(around("adakv", scores, monkeypatch).keep(prompt)) == [[0, 1, 2, 3], []]
    assert kept(around("adakv", scores, monkeypatch, safeguard=0.5).keep(prompt)) == [[0, 1, 2], [0]]


def test_chunkkv_keeps_whole_chunks(monkeypatch):
    prompt = random_prompt(tokens=50)
    score = torch.zeros(2, 50)
    score[0, 25] = 3.0
    score[:, 3] = 1.0
    found = kept(around("chunkkv", score.tolist(), monkeypatch).keep(prompt))
    # three chunks, of which floor(1.5) stays: that of the token which one head finds very important
    assert found == [list(range(20, 40))] * 2


def test_criticalkv_weighs_by_the_output(monkeypatch):
    prompt = random_prompt(heads=2, kv_heads=1, tokens=6, width=2, reader=torch.randn(3, 4))
    plain = [[0.6, 0.1, 0.2, 0.3, 0.4, 0.5]]
    method = around("criticalkv", plain, monkeypatch)
    score = method.score(prompt)[0, 0]
    norms = [
        sum((prompt.reader[:, 2 * h : 2 * h + 2] @ prompt.values[0, 0, j]).abs().sum() for h in range(2)) / 2
        for j in range(6)
    ]
    assert score[0] == math.inf  # int(6 * 0.5 * 0.5) = 1 is chosen by plain scores
    for j in range(1, 6):
        assert score[j] == pytest.approx(float((plain[0][j] + 1e-4) * norms[j]), rel=1e-5)


def test_block_kv_with_one_block_is_the_method_itself():
    prompt = random_prompt(tokens=30)
    whole = make_method("block_kv", {"length": 30})
    assert kept(whole.keep(prompt)) == kept(make_method("keydiff").keep(prompt))


def test_block_kv_lets_the_kept_compete_with_every_next_block():
    keys = torch.tensor([5.0, 4, 9, 1, 2, 8, 3, 7])[None, :, None] * torch.tensor([1.0, 0.0])
    found = make_method("block_kv", {"of": "knorm", "length": 2}).keep(prompt_of(keys))
    # norms decide alone, so that blocks change nothing here
    assert kept(found) == [[1, 3, 4, 6]]


def test_a_sparsity_for_every_layer():
    method = make_method("per_layer_kv", {"of": "knorm", "sparsities": "0.5/0/0.75"})
    prompt = replace(random_prompt(tokens=8), layers=3)
    assert [int(method.keep(replace(prompt, layer=n))[0, 0].sum()) for n in range(3)] == [4, 8, 2]


def test_a_key_turned_from_9_to_3_is_the_key_encoded_at_3():
    raw = torch.randn(1, 8, dtype=torch.float32)
    at = [ROPE.turned(raw, torch.tensor([p])) for p in (9, 3)]
    assert torch.allclose(ROPE.turned(at[0], torch.tensor([-6])), at[1], atol=1e-6)


def test_rerotated_attention_is_that_of_the_shortened_text():
    raw = random_prompt(heads=2, kv_heads=2, tokens=10)
    turned = [ROPE.turned(side, raw.positions[:, None]) for side in (raw.keys, raw.queries)]
    prompt = replace(raw, keys=turned[0], queries=turned[1], rope=ROPE)
    method = make_method("key_rerotation", {"of": "streaming_llm"})
    keep = method.keep(prompt)
    assert kept(keep) == [[0, 1, 2, 3, 9]] * 2
    moved = method.moved_keys(prompt, keep)[:, :, [0, 1, 2, 3, 9]]
    query = torch.randn(1, 2, 1, 8)
    logits = ROPE.turned(query, torch.tensor([[[10]]])) @ moved.mT
    short = ROPE.turned(raw.keys[:, :, [0, 1, 2, 3, 9]], torch.arange(5).expand(1, 2, 5))
    assert torch.allclose(logits, ROPE.turned(query, torch.tensor([[[5]]])) @ short.mT, atol=1e-5)
