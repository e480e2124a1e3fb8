"""Budgets of decoders end to end: what variants lose, that all budgets are met, and what is refused."""

from __future__ import annotations

import pytest
import torch

import secateur as sc
from families import make_tiny, tiny_ids
from runs import plan_for, tokens_of
from secateur.allocate.units import Limits
from secateur.criteria.divergence import kl_divergence
from secateur.engine import decide
from secateur.engine.budgets import measure_variants, variants_of, windows_for
from secateur.errors import BudgetError, OptionError, UsageError
from secateur.methods import make_method
from secateur.models.decoders import decoder_anatomy, decoder_blocks
from secateur.models.sources import Source
from secateur.models.surgery import layer_overrides
from secateur.plans import Plan
from secateur.report.build import build_report
from sublayers import plan_without

IDS = tiny_ids()


def left(plan, model, name):
    """The fraction of a cost that is left."""
    anatomy = decoder_anatomy(model)
    gone = sum((g.units - len(plan.keep[g.name])) * getattr(g.cost, name) for g in anatomy if g.name in plan.keep)
    dense = sum(g.units * g.cost.kv_bytes for g in anatomy if g.kind == "kv_head")
    return 1 - gone / (dense if name == "kv_bytes" else getattr(anatomy.blocks, name))


def logits(model, ids):
    with torch.inference_mode():
        return model(ids).logits


def test_kl_divergence_by_hand():
    dense, other = torch.tensor([[[0.0, 0.0]]]), torch.tensor([[[0.0, 3.0]]]).log_softmax(-1)
    by_hand = 0.5 * (0.5 / other.exp()).log().sum()
    assert kl_divergence(dense, other) == pytest.approx(float(by_hand))
    assert kl_divergence(dense, dense + 7) == pytest.approx(0.0, abs=1e-6)


def test_kl_divergence_is_that_of_torch_and_keeps_the_digits_of_a_small_one():
    generator = torch.Generator().manual_seed(0)
    dense = 10 * torch.randn(2, 300, 50, generator=generator)
    for apart in (1.0, 1e-2):
        other = dense + apart * torch.randn(dense.shape, generator=generator)
        log_p, log_q = dense.double().log_softmax(-1), other.double().log_softmax(-1)
        exact = torch.nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True) / 600
        assert kl_divergence(dense, other) == pytest.approx(float(exact), rel=1e-2)


@pytest.mark.parametrize("family", ["llama", "llama-tied-bias", "gemma2", "gpt2", "falcon", "granite", "opt"])
def test_the_loss_of_a_variant_is_that_of_the_model_cut_by_it(family):
    model, ids = make_tiny(family), IDS[:2]
    plan = plan_for("flap", model, IDS, budget="params=0.8", variants="scores")
    groups = decoder_anatomy(model).of_kind("kv_head", "neuron")
    variants = {g.name: variants_of(g, plan.scores[g.name], Limits(round_to=8)) for g in groups}
    kept = {name: dict([next(iter(by_size.items()))]) for name, by_size in variants.items()}

    def cut(block, group, units):
        columns = group.columns[[u for u in range(group.units) if u not in units.tolist()]].flatten()
        reader = block.get_submodule((group.reader or "").partition(f".{group.layer}.")[2])
        with torch.no_grad():
            reader.weight.index_fill_(0 if type(reader).__name__ == "Conv1D" else 1, columns, 0)

    found = measure_variants(
        Source(model), ids, kept, groups, cut, dtype=torch.float32, progress=lambda stage, done, total: None
    )
    dense = logits(model, ids)
    for group in (groups[0], groups[3]):
        ((size, units),) = kept[group.name].items()
        one = Plan(provenance=plan.provenance, groups={group.name: group.units}, keep={group.name: units})
        cut_one = logits(sc.apply(one, model), ids)
        assert found[group.name][size] == pytest.approx(kl_divergence(dense, cut_one), rel=1e-3, abs=1e-6)
        assert found[group.name][size] > 1e-4


@pytest.mark.parametrize("method", ["flap", "wanda_sp", "random_sp"])
@pytest.mark.parametrize("variants", ["measured", "scores"])
def test_both_budgets_are_met(method, variants):
    model = make_tiny("llama")
    plan = plan_for(method, model, IDS, budget="params=0.7,kv_bytes=0.84", variants=variants)
    # five of six key-value heads at most, and one neuron more wouldn't fit
    assert left(plan, model, "kv_bytes") <= 5 / 6 + 1e-9
    neuron = 3 * model.config.hidden_size / decoder_anatomy(model).blocks.params
    assert 0.7 - neuron < left(plan, model, "params") <= 0.7


@pytest.mark.parametrize("family", ["llama-tied-bias", "gpt2", "gpt_neox", "opt", "olmo2"])
def test_a_budget_counts_the_linear_weights_that_are_left_and_no_biases(family):
    model = make_tiny(family)
    budget = "params=0.7,macs=0.75,bytes=0.8"
    plan = sc.plan(model, method="random_sp", budget=budget, options={"variants": "scores"})

    def linear(decoder):
        return sum(p.numel() for p in decoder_blocks(decoder)[1].parameters() if p.dim() > 1)

    accounts = plan.provenance[0].budgets
    dense, cut = linear(model), linear(sc.apply(plan, model))
    assert cut <= 0.7 * dense
    for name, size in (("params", 1), ("macs", 1), ("bytes", 4)):
        assert (accounts[name].dense, accounts[name].pruned) == (size * dense, size * cut)


def test_uniform_widths_stay_plain():
    model = make_tiny("llama")
    plan = plan_for("flap", model, IDS, sparsity=0.3, uniform=True)
    cut = sc.apply(plan, model)
    assert not layer_overrides(cut.config)
    assert len({len(kept) for name, kept in plan.keep.items() if name.endswith("mlp")}) == 1
    # a neuron of every layer, or a head, is the least that can leave
    assert 0.6 < left(plan, model, "params") <= 0.7
    assert layer_overrides(sc.apply(plan_for("flap", model, IDS, sparsity=0.3), model).config)


def test_losses_are_kept_and_found_again(tmp_path, monkeypatch):
    model = make_tiny("llama")
    method = make_method("flap", {"budget": "params=0.7"})
    how = {"dtype": torch.float32, "batch_tokens": 32, "progress": lambda *_: None, "statistics": tmp_path}
    first = decide(method, Source(model), tokens_of(IDS), **how).whole
    assert len(list(tmp_path.glob("variants-*.json"))) == 1
    monkeypatch.setattr("secateur.engine.units.measure_variants", lambda *_, **__: pytest.fail("measured again"))
    again = decide(method, Source(model), tokens_of(IDS), **how).whole
    assert all(torch.equal(first.keep[name], again.keep[name]) for name in first.keep)
    # and so they are for another budget
    other = make_method("flap", {"budget": "params=0.8,kv_bytes=0.9"})
    assert decide(other, Source(model), tokens_of(IDS), **how).whole.budgets["kv_bytes"].asked == 0.9


def test_a_window_is_cut_to_the_tokens_that_are_asked_for():
    assert windows_for(IDS, 40).shape == (2, 16)
    assert windows_for(IDS, 5).shape == (1, 5)


def test_the_plan_and_the_report_say_what_was_asked_and_what_came_of_it(tmp_path):
    model = make_tiny("llama")
    plan = sc.plan(model, method="magnitude_sp", budget={"params": 0.75, "macs": 0.8}, options={"variants": "scores"})
    (provenance,) = plan.provenance
    assert provenance.options["budget"] == "params=0.75,macs=0.8" and "sparsity" not in provenance.options
    account = provenance.budgets["params"]
    assert account.asked == 0.75 and account.dense == decoder_anatomy(model).blocks.params
    assert account.pruned / account.dense == pytest.approx(left(plan, model, "params"))
    assert Plan.load(plan.save(tmp_path / "plan")).provenance == plan.provenance
    report = build_report(plan, decoder_anatomy(model))
    assert report.requested == "75.0 % of the parameters and 80.0 % of the MACs left"
    metric = report.metrics[0]
    assert metric.name == "budget: parameters" and metric.values["pruned"] == account.pruned
    assert metric.protocol.startswith("at most 75.0% asked, 7")


def test_everything_may_stay():
    plan = plan_for("flap", make_tiny("llama"), IDS, budget="params=1,kv_bytes=1")
    assert plan.is_identity


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"budget": "latncy=0.7"}, OptionError, r"budget must be one of params.* got 'latncy'; did you mean 'latency'"),
        ({"budget": "params=0.7,params=0.6"}, OptionError, "budget params is given twice"),
        ({"budget": "params=most"}, OptionError, "takes a fraction of the dense model, as in params=0.7, got 'most'"),
        ({"budget": "params=1.3"}, OptionError, r"budget params must lie in \(0, 1\], got 1.3"),
        ({"budget": "params=0"}, OptionError, r"budget params must lie in \(0, 1\], got 0"),
        ({"budget": "params=nan"}, OptionError, r"budget params must lie in \(0, 1\], got nan"),
        ({"budget": "kv_bytes=0.7", "heads": "query"}, OptionError, "budget kv_bytes needs heads=kv"),
        ({"workload": "promt=3"}, OptionError, "a workload is made of batch, prompt, new, got 'promt'"),
        ({"workload": "batch=0"}, OptionError, "workload batch must be a whole number of at least 1, got '0'"),
        ({"budget": "params=0.01", "min_keep": 4}, BudgetError, r"at least 4 unit\(s\) kept in every group"),
        ({"budget": "latency=0.7"}, UsageError, "workload batch=1,prompt=256,new=32 takes 288 positions"),
    ],
)
def test_one_sentence_says_what_is_wrong(options, error, sentence):
    with pytest.raises(error, match=sentence):
        plan_for("magnitude_sp", make_tiny("llama"), IDS, **options)


@pytest.mark.parametrize(
    "options", [{"budget": "kv_bytes=0.5"}, {"budget": "kv_bytes"}, {"budget": "params=0.9,kv_bytes=0.9"}]
)
def test_a_model_without_attention_has_no_kv_cache(options):
    model = make_tiny("llama")
    cut = sc.apply(plan_without(model, [f"layers.{layer}.attention" for layer in range(3)]), model)
    with pytest.raises(BudgetError, match="the model has no KV cache to shrink"):
        plan_for("flap", cut, IDS, **options)


def test_sparsity_and_fractions_exclude_each_other():
    with pytest.raises(OptionError, match=r"sparsity and budget params=0\.8 both say how much stays"):
        sc.plan(make_tiny("llama"), method="magnitude_sp", sparsity=0.2, budget={"params": 0.8})
    with pytest.raises(UsageError, match="random takes no budget"):
        sc.plan(make_tiny("llama"), method="random", budget={"params": 0.8})
