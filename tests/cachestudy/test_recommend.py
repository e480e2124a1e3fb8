"""A setting that fits: the smallest fraction, the room that is needed, and what is refused."""

from __future__ import annotations

import pytest
import torch

import secateur as sc
from families import make_tiny, tiny_ids
from secateur.cache.sizes import cache_shape
from secateur.cachestudy.smallest import first_true
from secateur.errors import BudgetError, UsageError


@pytest.fixture(scope="module")
def model():
    return make_tiny("llama", max_position_embeddings=2048)


def test_what_is_recommended_fits_and_less_does_not(model):
    dense = cache_shape(model).dense_bytes(1000)
    found = sc.recommend_cache(model, context=1000, memory=dense * 8 // 10, presses=["knorm"])
    cache = sc.compressed_cache(found.spec, model)
    with torch.no_grad():
        model(tiny_ids(windows=1, length=1000), cache=cache)
    held = cache.report()["bytes_held"]
    # one of three layers is dense while the prompt is read
    assert found.chosen.bytes_held == held and found.chosen.bytes_peak == held + dense // 3 <= dense * 8 // 10
    gentler = f"knorm:{found.chosen.sparsity - 0.01:g}"
    assert sc.recommend_cache(model, context=1000, memory=found.chosen.bytes_peak, presses=["knorm"]).spec == found.spec
    again = sc.compressed_cache(gentler, model)
    with torch.no_grad():
        model(tiny_ids(windows=1, length=1000), cache=again)
    assert again.report()["bytes_held"] + dense // 3 > dense * 8 // 10


def test_nothing_is_removed_where_all_fits(model):
    found = sc.recommend_cache(model, context=1000, memory="1GiB")
    assert found.spec == "dense" and found.chosen is None and "nothing has to be removed" in found.sentence


def test_gentle_presses_come_first_and_new_tokens_take_room(model):
    shape = cache_shape(model)
    room = int(shape.dense_bytes(1000) * 0.95)
    found = sc.recommend_cache(model, context=1000, memory=room, question="end")
    assert found.chosen.press == "adakv(snapkv)"
    # head_dim 8 and float32: the bitmap is small, and a window of 32 tokens with them
    assert [one.press for one in found.candidates][:2] == ["think", "mustafar"] and not found.candidates[0].gentle
    more = sc.recommend_cache(model, context=1000, new=200, memory=room, question="end")
    assert more.chosen.bytes_held >= shape.dense_bytes(200)
    assert more.chosen.sparsity >= found.chosen.sparsity and more.bytes_dense == shape.dense_bytes(1200)
    twice = sc.recommend_cache(model, context=1000, memory=2 * room, batch=2, question="end")
    assert twice.spec == found.spec and twice.chosen.bytes_held == 2 * found.chosen.bytes_held
    assert twice.to_dict()["candidates"][0]["spec"] == twice.candidates[0].spec


def test_what_is_refused(model):
    with pytest.raises(BudgetError, match=r"none of think, mustafar, expected_attention.* gets it into 1\.0 kB"):
        sc.recommend_cache(model, context=1000, memory=1000)
    with pytest.raises(UsageError, match="context must be at least 1, got 0"):
        sc.recommend_cache(model, context=0, memory="1GiB")
    with pytest.raises(UsageError, match="question must be one of later, end, got 'never'"):
        sc.recommend_cache(model, context=10, memory="1GiB", question="never")
    with pytest.raises(UsageError, match="a size is a number with a unit"):
        sc.recommend_cache(model, context=10, memory="much")


def test_first_true_of_all_thresholds():
    assert [first_true(lambda n, t=t: n >= t, 5) for t in range(1, 7)] == [1, 2, 3, 4, 5, None]
