"""ThinK: the query-driven score, the greedy optimum, and thin attention beside zeros."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import secateur as sc
from cache_prompts import prompt_of, random_prompt
from families import make_tiny, tiny_ids
from secateur.cache.attention import Visible, mixed_attention
from secateur.cache.rows import DenseRows, Span, ThinRows
from secateur.cache.store import Store
from secateur.methods import make_method


def test_a_channel_leaves_by_its_queries_though_its_keys_are_long():
    keys, queries = torch.tensor([[[1.0, 3.0], [1.0, 3.0]]]), torch.tensor([[[1.0, 0.1], [1.0, 0.1]]])
    method = make_method("think", {"sparsity": 0.5})
    assert torch.allclose(method.channel_score(prompt_of(keys, queries=queries))[0, 0], torch.tensor([1.0, 0.09]))
    assert method.channels(prompt_of(keys, queries=queries)).tolist() == [[[0]]]


def test_the_score_ranks_like_the_norm_of_a_channels_outer_product():
    prompt = random_prompt(heads=1, kv_heads=1, tokens=32)
    queries, keys = prompt.queries[0, 0].double(), prompt.keys[0, 0].double()
    norms = torch.stack([torch.outer(queries[:, d], keys[:, d]).norm() for d in range(8)])
    assert torch.allclose(norms, queries.norm(dim=0) * keys.norm(dim=0), rtol=1e-6)
    score = make_method("think").channel_score(prompt)[0, 0]
    assert torch.equal(score.argsort(), norms.argsort())


def test_one_channel_is_the_one_whose_loss_is_least_by_trying_all():
    prompt = random_prompt(heads=1, kv_heads=1, tokens=32, seed=3)
    queries, keys = prompt.queries[0, 0], prompt.keys[0, 0]
    lost = [torch.outer(queries[:, d], keys[:, d]).norm() for d in range(8)]
    kept = make_method("think", {"sparsity": 1 / 8}).channels(prompt)[0, 0].tolist()
    assert set(range(8)) - set(kept) == {int(torch.stack(lost).argmin())}


def test_only_the_last_queries_are_looked_at():
    prompt = random_prompt(tokens=50)
    changed = replace(prompt, queries=torch.cat([prompt.queries[:, :, :18] * 9, prompt.queries[:, :, 18:]], dim=2))
    method = make_method("think")
    assert torch.equal(method.channel_score(prompt), method.channel_score(changed))


def test_query_heads_that_are_alike_count_like_one():
    one = random_prompt(heads=2, kv_heads=2)
    doubled = replace(one, queries=one.queries.repeat_interleave(2, dim=1))
    method = make_method("think")
    assert torch.allclose(method.channel_score(one), method.channel_score(doubled))


def test_the_floor_of_the_channels_leaves_and_of_equals_the_first():
    method = make_method("think", {"sparsity": 0.4})
    assert method.channels(prompt_of(torch.ones(1, 4, 8), queries=torch.ones(1, 4, 8))).tolist() == [[[3, 4, 5, 6, 7]]]


def stores(kind, sparsity=0.5, tokens=12):
    prompt = random_prompt(tokens=tokens)
    channels = make_method("think", {"sparsity": sparsity}).channels(prompt).flatten(0, 1)
    lengths = torch.full((1, 2), tokens)
    rows = {"key": prompt.keys.flatten(0, 2), "value": prompt.values.flatten(0, 2)}
    thin = {side: ThinRows.encode(x, lengths.flatten(), channels) for side, x in rows.items()}
    zero = {side: DenseRows(thin[side].dense(Span(0, 2 * tokens, 0, (1, 2))).flatten(0, 2)) for side in rows}
    sides = [{**{s: DenseRows(x) for s, x in rows.items()}, kind: one[kind]} for one in (thin, zero)]
    return [Store(lengths, side["key"], side["value"]) for side in sides]


@pytest.mark.parametrize("kind", ["key", "value"])
def test_thin_attention_is_that_on_zeros(kind):
    thin, zero = stores(kind)
    query, tail = torch.randn(1, 4, 1, 8), (torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8))
    positions = torch.arange(12, 15).expand(1, 2, 3)
    mine, theirs = (
        mixed_attention(query, store, tail, positions, Visible(None, 1, 15), 8**-0.5) for store in (thin, zero)
    )
    assert torch.allclose(mine, theirs, atol=1e-6)
    keys = torch.cat([zero.keys.x.view(1, 2, 12, 8), tail[0]], dim=2).repeat_interleave(2, dim=1)
    values = torch.cat([zero.values.x.view(1, 2, 12, 8), tail[1]], dim=2).repeat_interleave(2, dim=1)
    dense = torch.nn.functional.scaled_dot_product_attention(query, keys, values)  # divides by sqrt(8), not sqrt(4)
    assert torch.allclose(mine, dense.transpose(1, 2), atol=1e-6)


def test_channels_that_no_query_uses_leave_without_loss():
    prompt = random_prompt(tokens=12)
    queries = prompt.queries.clone()
    queries[..., [1, 5, 6]] = 0
    channels = make_method("think", {"sparsity": 3 / 8}).channels(replace(prompt, queries=queries))
    assert channels.tolist() == [[[0, 2, 3, 4, 7]] * 2]
    thin = ThinRows.encode(prompt.keys.flatten(0, 2), torch.tensor([12, 12]), channels.flatten(0, 1))
    logits = thin.logits(queries[:, ::2], Span(0, 24, 0, (1, 2)))
    assert torch.allclose(logits, queries[:, ::2] @ prompt.keys.mT, atol=1e-6)


def test_elements_that_are_stored():
    model = make_tiny("llama", num_hidden_layers=1)
    cache = sc.compressed_cache("think:0.4,recent=5", model)
    with torch.no_grad():
        model(tiny_ids(windows=1, length=24), cache=cache)
    layer = cache.layers[0]
    stored = layer.store.keys.elements + layer.keys.numel()
    assert stored == 2 * ((24 - 5) * (8 - int(8 * 0.4)) + 5 * 8)
    assert layer.store.values.elements + layer.values.numel() == 2 * 24 * 8


def test_values_leave_by_their_own_size():
    prompt = random_prompt()
    method = make_method("think", {"target": "value"})
    assert torch.allclose(method.channel_score(prompt), prompt.values.square().mean(dim=2))


def test_squares_of_long_keys_dont_overflow_float16():
    prompt = prompt_of(torch.full((1, 40, 4), 300.0).half(), queries=torch.ones(1, 40, 4).half())
    assert bool(torch.isfinite(make_method("think").channel_score(prompt)).all())
