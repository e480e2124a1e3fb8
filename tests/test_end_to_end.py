"""On a trained model the published order of the methods must show.

All of it takes as few tokens as leave the order clear: what is compared with ``<`` differs by 6 % at least, and where
weights are fitted, which needs more tokens than the widest matrix has inputs, by 20 %.
"""

from __future__ import annotations

import pytest

import secateur as sc

pytestmark = pytest.mark.model
SMALL = {"samples": 8, "length": 128}
ENOUGH = {"samples": 7, "length": 256}
MEASURED = {"length": 128, "windows": 4}


@pytest.fixture(scope="module")
def loaded():
    return sc.load("smollm2-135m")


@pytest.fixture(scope="module")
def pruned(loaded, tmp_path_factory):
    statistics = tmp_path_factory.mktemp("statistics")

    def prune(method, calibration=SMALL, **options):
        # statistics of the dense model serve every plan of a method that looks at it alone
        plan = sc.plan(*loaded, method=method, options=options, dtype="float32", statistics=statistics, **calibration)
        return sc.apply(plan, loaded[0])

    return prune


@pytest.fixture(scope="module")
def perplexity(loaded):
    def measure(model):
        table = sc.evaluate({"model": model}, loaded[1], ["perplexity:builtin"], **MEASURED)
        return table["perplexity"].values["model"]

    return measure


@pytest.fixture(scope="module")
def dense(loaded, perplexity):
    return perplexity(loaded[0])


@pytest.fixture(scope="module")
def lightly_pruned(pruned):
    return pruned("wanda", sparsity=0.1)


def test_unstructured_order_at_half(pruned, perplexity, dense):
    magnitude, wanda = (perplexity(pruned(method, sparsity=0.5)) for method in ("magnitude", "wanda"))
    sparsegpt = perplexity(pruned("sparsegpt", ENOUGH, sparsity=0.5))
    assert dense < sparsegpt < wanda < magnitude


def test_structured_order_at_a_fifth(pruned, perplexity, dense):
    flap, without, wanda_sp = (
        perplexity(pruned("flap", sparsity=0.2)),
        perplexity(pruned("flap", sparsity=0.2, bias=False)),
        perplexity(pruned("wanda_sp", sparsity=0.2)),
    )
    # on this little text FLAP and Wanda-sp are level; the study with more shows the difference
    assert dense < flap < without and flap < 1.05 * wanda_sp
    worse = (perplexity(pruned(method, sparsity=0.2)) for method in ("random_sp", "magnitude_sp"))
    assert 4 * max(without, wanda_sp) < min(worse)


def test_a_small_cut_costs_little(pruned, perplexity, dense, lightly_pruned):
    assert perplexity(lightly_pruned) < 1.05 * dense
    assert perplexity(pruned("flap", sparsity=0.05)) < 1.25 * dense


def test_the_greedy_text_of_a_lightly_pruned_model_is_sane(loaded, lightly_pruned):
    _, tokenizer = loaded
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    text = tokenizer.decode(lightly_pruned.generate(ids, max_new_tokens=8, do_sample=False)[0])
    assert "Paris" in text
