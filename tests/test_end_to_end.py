"""On a trained model the published order of the methods must show."""

from __future__ import annotations

import pytest

import secateur as sc

pytestmark = pytest.mark.model
SMALL = {"samples": 8, "length": 256}


@pytest.fixture(scope="module")
def loaded():
    return sc.load("smollm2-135m")


@pytest.fixture(scope="module")
def perplexity(loaded):
    model, tokenizer = loaded

    def measure(method=None, **options):
        pruned = model
        if method is not None:
            plan = sc.plan(model, tokenizer, method=method, options=options, dtype="float32", **SMALL)
            pruned = sc.apply(plan, model)
        table = sc.evaluate({"model": pruned}, tokenizer, ["perplexity:builtin"], length=256, windows=8)
        return table["perplexity"].values["model"]

    return measure


@pytest.fixture(scope="module")
def dense(perplexity):
    return perplexity()


def test_unstructured_order_at_half(perplexity, dense):
    magnitude, wanda, sparsegpt = (perplexity(m, sparsity=0.5) for m in ("magnitude", "wanda", "sparsegpt"))
    assert dense < sparsegpt < wanda < magnitude


def test_structured_order_at_a_fifth(perplexity, dense):
    flap, without, wanda_sp = (
        perplexity("flap", sparsity=0.2),
        perplexity("flap", sparsity=0.2, bias=False),
        perplexity("wanda_sp", sparsity=0.2),
    )
    # on this little text FLAP and Wanda-sp are level; the study with more shows the difference
    assert dense < flap < without and flap < 1.05 * wanda_sp
    assert 4 * max(without, wanda_sp) < min(perplexity(m, sparsity=0.2) for m in ("random_sp", "magnitude_sp"))


def test_a_small_cut_costs_little(perplexity, dense):
    assert perplexity("wanda", sparsity=0.1) < 1.05 * dense
    assert perplexity("flap", sparsity=0.05) < 1.25 * dense


def test_the_greedy_text_of_a_lightly_pruned_model_is_sane(loaded):
    model, tokenizer = loaded
    pruned = sc.prune(model, tokenizer, method="wanda", sparsity=0.2, dtype="float32", **SMALL).model
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    text = tokenizer.decode(pruned.generate(ids, max_new_tokens=8, do_sample=False)[0])
    assert "Paris" in text
