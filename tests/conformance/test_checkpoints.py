"""Every family: pruned, saved, reloaded by secateur and by transformers, and compared."""

from __future__ import annotations

import pytest
import torch

import secateur as sc
from families import FAMILY_CONFIGS, make_tiny, tiny_ids
from runs import plan_for
from secateur.models.saving import plain

IDS = tiny_ids()
# an adaptive cut with biases, a uniform one, blocks, and zeros in the packed format; sub-layers have their own tests
CASES = {
    "flap": ({"sparsity": 0.4}, "dense"),
    "random_sp": ({"sparsity": 0.4}, "dense"),
    "shortgpt": ({"layers": 1}, "dense"),
    "wanda": ({"pattern": "2:4"}, "packed"),
}


@pytest.mark.parametrize("method", CASES)
@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_saved_model_gives_the_logits_of_the_one_in_memory(family, method, tmp_path):
    from transformers import AutoModelForCausalLM

    options, format = CASES[method]
    model = make_tiny(family)
    plan = plan_for(method, model, IDS, **options)
    cut = sc.apply(plan, model)
    folder = sc.save(cut, None, tmp_path / "cut", plan=plan, format=format)
    with torch.no_grad():
        expected = cut(IDS).logits
        again, _ = sc.load(folder)
        torch.testing.assert_close(again(IDS).logits, expected, rtol=1e-5, atol=1e-5)
        needs_code = format == "packed" or not plain(cut)
        stock = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=needs_code).eval()
        torch.testing.assert_close(stock(IDS).logits, expected, rtol=1e-5, atol=1e-5)
        written = stock.generate(IDS[:1, :6], max_new_tokens=5, do_sample=False)
        assert torch.equal(written, cut.generate(IDS[:1, :6], max_new_tokens=5, do_sample=False))
    assert sc.Plan.load(folder / "plan").method == method


@pytest.mark.parametrize("family", ["llama", "qwen3", "granite"])
def test_a_uniform_cut_of_these_families_is_plain(family):
    model = make_tiny(family)
    assert plain(sc.apply(plan_for("random_sp", model, IDS, sparsity=0.4), model))


@pytest.mark.parametrize("family", ["llama", "smollm3"])
def test_a_uniform_cut_with_biases_is_plain_where_the_config_has_a_flag(family):
    model = make_tiny(family)
    plan = plan_for("flap", model, IDS, sparsity=0.4, structure="UL-UM")
    assert plan.biases
    cut = sc.apply(plan, model)
    assert cut.config.mlp_bias and plain(cut)


def test_a_cut_model_can_be_cut_again():
    model = make_tiny("llama")
    once = sc.apply(plan_for("flap", model, IDS, sparsity=0.2), model)
    plan = plan_for("wanda_sp", once, IDS, sparsity=0.2)
    masked, twice = sc.apply(plan, once, mask=True), sc.apply(plan, once)
    with torch.no_grad():
        torch.testing.assert_close(twice(IDS).logits, masked(IDS).logits, rtol=1e-4, atol=1e-4)
    assert sum(p.numel() for p in twice.parameters()) < sum(p.numel() for p in once.parameters())
    fewer = sc.apply(plan_for("shortgpt", twice, IDS, layers=1), twice)
    with torch.no_grad():
        assert torch.isfinite(fewer(IDS).logits).all()
    assert fewer.config.num_hidden_layers == 2
