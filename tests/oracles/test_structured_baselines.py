"""Oracles of wanda_sp, magnitude_sp, random_sp and shortgpt."""

import pytest
import torch

import secateur as sc
from families import make_tiny, tiny_ids
from runs import plan_for
from secateur.methods import Target, list_methods, make_method
from secateur.observe import Similarity, SumSquares


def target_of(kind="kv_head"):
    w = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    return w, Target("layers.0.attention", kind, 0, w, torch.arange(8).reshape(2, 4))


def test_magnitude_sp_sums_column_norms_over_the_head():
    w, target = target_of()
    expected = w.double().norm(dim=0).reshape(2, 4).sum(dim=1)
    torch.testing.assert_close(make_method("magnitude_sp").score(target, {}), expected)


def test_wanda_sp_averages_wanda_over_outputs_and_sums_over_the_head():
    w, target = target_of()
    x = torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(1))
    squares = SumSquares()
    squares.update(x)
    a = x.double().square().sum(dim=1).mean(dim=0)
    expected = (w.double().abs() * a.sqrt()).mean(dim=0).reshape(2, 4).sum(dim=1)
    torch.testing.assert_close(make_method("wanda_sp").score(target, {"squares": squares}), expected, rtol=1e-6, atol=0)


def test_random_scores_depend_on_seed_and_name_only():
    _, target = target_of()
    first, again = (make_method("random_sp", {"seed": 3}).score(target, {}) for _ in range(2))
    other = make_method("random_sp", {"seed": 4}).score(target, {})
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_block_influence_lies_between_0_and_2_and_is_0_for_an_unchanged_stream():
    x = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
    for after, expected in ((x, 0.0), (3 * x, 0.0), (-x, 2.0)):
        seen = Similarity()
        seen.update(torch.cat([x, after], dim=-1))
        score = make_method("shortgpt").score(Target("layers.0", "layer", 0, torch.empty(0, 0)), {"similarity": seen})
        assert score == pytest.approx(expected, abs=1e-6)


def test_a_silent_block_is_removed_first_and_the_logits_stay():
    model, ids = make_tiny("llama"), tiny_ids()
    block = model.model.layers[1]
    with torch.no_grad():
        block.self_attn.o_proj.weight.zero_()
        block.mlp.down_proj.weight.zero_()
    plan = plan_for("shortgpt", model, ids, layers=1)
    assert plan.keep["layers"].tolist() == [0, 2]
    with torch.no_grad():
        torch.testing.assert_close(sc.apply(plan, model)(ids).logits, model(ids).logits)


def test_removing_no_block_is_the_identity():
    model, ids = make_tiny("llama"), tiny_ids()
    assert plan_for("shortgpt", model, ids, sparsity=0.0).is_identity


@pytest.mark.parametrize("method", ["wanda_sp", "osscar"], ids=["all blocks at once", "block by block"])
def test_heads_that_an_even_budget_is_too_small_for_are_told_of(method: str):
    model, ids = make_tiny("llama"), tiny_ids()
    # a fifth of two key-value heads is less than one of them, a half is one
    told = [note for note in plan_for(method, model, ids, sparsity=0.2).provenance[0].notes if "leave" in note]
    assert told == ["no heads leave: the whole budget comes out of FFN neurons"]
    notes = plan_for(method, model, ids, sparsity=0.5).provenance[0].notes
    assert not any("leave" in note for note in notes)


def test_the_methods_of_this_release():
    assert {"random", "magnitude", "magnitude_sp", "wanda", "sparsegpt", "wanda_sp", "flap", "shortgpt"} <= set(
        list_methods()
    )
