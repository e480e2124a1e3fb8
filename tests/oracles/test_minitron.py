"""Oracles of minitron: the statistic by hand, and heads that are ranked inside their key-value group."""

import pytest
import torch

import secateur as sc
from families import make_tiny, tiny_ids
from runs import plan_for
from secateur.methods import Target, make_method
from secateur.models.decoders import decoder_anatomy
from secateur.observe import Amplitudes

IDS = tiny_ids()


def seen(x_BTC):
    found = Amplitudes()
    found.update(x_BTC)
    return {"amplitudes": found}


def test_a_neuron_by_hand():
    # two texts of two tokens: the means of |x| are 2 and 2
    x = torch.tensor([[[1.0], [-3.0]], [[2.0], [2.0]]])
    target = Target("layers.0.mlp", "neuron", 0, torch.ones(1, 1), torch.tensor([[0]]))
    assert make_method("minitron").score(target, seen(x)).item() == pytest.approx(8**0.5)


@pytest.mark.parametrize("over_tokens", Amplitudes.WAYS)
@pytest.mark.parametrize("over_texts", Amplitudes.WAYS)
def test_every_way_to_put_tokens_and_texts_together(over_tokens, over_texts):
    x = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0)) + 0.5
    ways = {
        "mean": lambda y, dim: y.abs().mean(dim=dim),
        "l2": lambda y, dim: y.square().sum(dim=dim).sqrt(),
        "var": lambda y, dim: y.var(dim=dim, correction=0),
    }
    channel_I = ways[over_texts](ways[over_tokens](x.double(), 1), 0)
    target = Target("layers.0.attention", "head", 0, torch.ones(1, 6), torch.arange(6).reshape(2, 3))
    options = {"over_tokens": over_tokens, "over_texts": over_texts}
    expected = channel_I.reshape(2, 3).norm(dim=1)
    torch.testing.assert_close(make_method("minitron", options).score(target, seen(x)), expected)


def test_heads_are_ranked_inside_their_key_value_group():
    model = make_tiny("llama", num_attention_heads=8, hidden_size=64)
    plan = plan_for("minitron", model, IDS, sparsity=0.3)
    anatomy = decoder_anatomy(model, heads="query")
    for layer in range(3):
        name = f"layers.{layer}.attention"
        assert anatomy[name].balance == 2 and len(plan.removed(name)) == 2
        for part, scores in enumerate(plan.scores[name].reshape(2, 4)):
            (left,) = [unit for unit in plan.removed(name).tolist() if unit // 4 == part]
            assert left == 4 * part + int(scores.argmin())
    cut = sc.apply(plan, model)
    assert (cut.config.num_attention_heads, cut.config.num_key_value_heads) == (6, 2)


def test_where_every_head_has_its_own_keys_none_can_leave():
    model = make_tiny("llama", num_key_value_heads=4)
    plan = plan_for("minitron", model, IDS, sparsity=0.3)
    assert all(len(plan.removed(name)) == 0 for name in plan.keep if name.endswith("attention"))
    assert any(len(plan.removed(name)) for name in plan.keep)
    whole = plan_for("minitron", model, IDS, sparsity=0.3, heads="kv")
    assert all(len(whole.removed(name)) == 1 for name in whole.keep if name.endswith("attention"))
