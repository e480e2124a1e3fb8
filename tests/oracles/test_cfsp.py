"""Oracles of cfsp: scores against the published formulas on random weights, keeps and roundings by hand, ranks."""

import itertools

import pytest
import torch

import secateur as sc
from families import make_tiny, tiny_ids
from runs import plan_for
from secateur.allocators import BlockWeights, parse_allocator
from secateur.errors import BudgetError, OptionError, UnsupportedModelError, UsageError
from secateur.healing.recovery.capacity import guided_ranks, ranks_by_module
from secateur.methods import Target, make_method
from secateur.observe import Change, Similarity, SumSquares
from secateur.recipes import make_recipe
from sublayers import plan_without

IDS = tiny_ids()
D, F = 6, 10


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def published(metric, w_DI, up_DI, gate_DI, n_I, b=1.0, c=1.0):
    """The formulas as they are published, each ratio over the outputs."""
    sizes = w_DI.abs() * (n_I**b if metric.endswith("_wa") else 1)
    ratios = [m / m.sum(dim=0) for m in (sizes, up_DI.abs(), gate_DI.abs())]
    ratios = ratios if metric.startswith("three") else ratios[:1]
    return (sum(ratios) * n_I ** (0.5 if metric == "one_a" else c)).mean(dim=0)


def scored(metric, w_DI, x_BTI, **options):
    seen = SumSquares()
    seen.update(x_BTI)
    target = Target("down", "neuron", 0, w_DI, torch.arange(F)[:, None])
    return make_method("cfsp", {"metric": metric, **options}).score(target, {"squares": seen}).double()


@pytest.mark.parametrize("metric", ["three_w_one_wa", "three_w_one_a", "one_wa", "one_a"])
@pytest.mark.parametrize("c", [1.0, 2.0])
def test_the_weights_cancel_in_the_published_scores(metric, c):
    w_DI, up_DI, gate_DI, x_BTI = random(D, F), random(D, F, seed=1), random(D, F, seed=2), random(3, 5, F, seed=3)
    n_I = (x_BTI.square().sum(dim=(0, 1)) / 3).sqrt()
    found = scored(metric, w_DI, x_BTI, c=c)
    for b in (1.0, 3.0):
        torch.testing.assert_close(
            found, published(metric, w_DI, up_DI, gate_DI, n_I, b, c), rtol=1e-6, atol=0, check_dtype=False
        )
    assert torch.equal(found.argsort(), n_I.argsort())
    # by hand: 3 n / d, n / d, n^0.5 / d
    factor, exponent = {"one_wa": (1, c), "one_a": (1, 0.5)}.get(metric, (3, c))
    torch.testing.assert_close(found, factor / D * n_I**exponent, rtol=1e-6, atol=0)


def test_the_other_scores_by_their_formulas():
    w_DI, x_BTI = random(D, F), random(3, 5, F, seed=3)
    n_I = (x_BTI.square().sum(dim=(0, 1)) / 3).sqrt()
    torch.testing.assert_close(scored("wanda_base", w_DI, x_BTI), (w_DI.abs() * n_I).mean(dim=0), rtol=1e-6, atol=0)
    torch.testing.assert_close(scored("mag_base", w_DI, x_BTI), w_DI.norm(dim=0), rtol=1e-6, atol=0)
    eq8 = sum(row.abs() * n_I / (row.abs().sum() * n_I.sum()) for row in w_DI)
    torch.testing.assert_close(scored("eq8", w_DI, x_BTI), eq8, rtol=1e-6, atol=0)
    # what is silent, and an output without weights, give no NaN
    silent = x_BTI.clone()
    silent[..., 0] = 0
    w_DI[2] = 0
    assert all(torch.isfinite(scored(m, w_DI, silent)).all() for m in ("eq8", "three_w_one_wa", "wanda_base"))


def test_sums_that_half_precision_cannot_hold():
    assert torch.isfinite(scored("three_w_one_wa", random(D, F), torch.full((1, 4, F), 6e4, dtype=torch.float16))).all()


@pytest.mark.parametrize(("keep", "kept"), [(0.8, 1280), (0.5, 768)])
def test_neurons_are_rounded_to_the_nearest_128(make_llama, keep, kept):
    model = make_llama(intermediate_size=1536, hidden_size=8, num_attention_heads=2, num_key_value_heads=1)
    plan = plan_for(
        "cfsp", model, IDS, sparsity=1 - keep, budget="neurons", round_to=128, metric="mag_base", spread="uniform"
    )
    assert {len(left) for left in plan.keep.values()} == {kept}


def test_only_neurons_leave_and_blocks_share_by_the_angle():
    model = make_tiny("llama")
    plan = plan_for("cfsp", model, IDS, sparsity=0.4, budget="neurons")
    assert all(name.endswith("mlp") for name in plan.keep)
    shares = plan.provenance[0].allocation.sparsities
    assert sum(shares.values()) / 3 == pytest.approx(0.4) and len(set(shares.values())) == 3
    for layer in range(3):
        assert abs(len(plan.removed(f"layers.{layer}.mlp")) - 40 * shares[f"layers.{layer}"]) <= 0.5
    # a fraction of all parameters takes more of the neurons
    wider = plan_for("cfsp", model, IDS, sparsity=0.4)
    assert sum(map(len, wider.keep.values())) < sum(map(len, plan.keep.values()))


def test_a_block_that_does_nothing_loses_most():
    model = make_tiny("llama")
    with torch.no_grad():
        for part in (model.model.layers[1].self_attn.o_proj, model.model.layers[1].mlp.down_proj):
            part.weight.zero_()
    # without scores of its weights, whose columns are all zero
    shares = plan_for("cfsp", model, IDS, sparsity=0.3).provenance[0].allocation.sparsities
    assert max(shares, key=shares.__getitem__) == "layers.1"


@pytest.mark.parametrize("metric", ["angular", "cosine", "mse", "mae"])
def test_the_coarse_metrics_by_hand(metric):
    allocator = parse_allocator(f"cfsp:metric={metric}")
    ((name, kind),) = allocator.needed_statistics(None).items()
    seen, both = kind(), kind()
    before, after = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]]), torch.tensor([[[0.0, 1.0], [0.0, 4.0]]])
    x = torch.cat([before, after], dim=-1)
    seen.update(x)
    expected = {"angular": 0.25, "cosine": 0.5, "mse": (1 + 2) / 2, "mae": (1 + 1) / 2}[metric]
    assert float(allocator.measure(BlockWeights((), {"": {name: seen}}), None)) == pytest.approx(expected, abs=1e-6)
    for one in (x[:, :1], x[:, 1:]):
        part = kind()
        part.update(one)
        both.merge(part)
    assert both.state().keys() == seen.state().keys()
    assert all(torch.allclose(both.state()[key], value) for key, value in seen.state().items())


def test_a_cosine_that_is_not_a_number_is_a_half():
    """In the angle as well, which is a third of half a turn then."""
    x = torch.tensor([[[0.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 2.0]]])
    for metric, expected in (("cosine", 3 * 0.5 / 4), ("angular", 3 / 3 / 4)):
        allocator = parse_allocator(f"cfsp:metric={metric}")
        ((name, kind),) = allocator.needed_statistics(None).items()
        seen = kind()
        seen.update(x)
        assert float(allocator.measure(BlockWeights((), {"": {name: seen}}), None)) == pytest.approx(expected)
    # a block's influence counts no likeness there
    shortgpt = Similarity()
    shortgpt.update(x)
    assert shortgpt.mean == pytest.approx(1 / 4)


def test_change_keeps_what_it_has_seen():
    seen, again = Change(), Change()
    seen.update(random(2, 3, 8).float())
    again.load_state(seen.state())
    assert (again.square, again.absolute) == (seen.square, seen.absolute) and seen.square > 0


# -- IG-LoRA ---------------------------------------------------------------------------------------------------------


def test_ranks_follow_what_blocks_kept_and_add_up():
    assert guided_ranks([0.5] * 4, 8) == [8] * 4
    assert guided_ranks([0.8, 0.4, 0.6, 0.6], 8) == [11, 5, 8, 8]
    for keeps, rank in itertools.product(([0.9, 0.1, 0.1], [0.31, 0.52, 0.74]), (1, 2, 8)):
        ranks = guided_ranks(keeps, rank)
        assert sum(ranks) == 3 * rank and min(ranks) >= 1
        assert sorted(ranks) == [r for _, r in sorted(zip(keeps, ranks, strict=True))]


def test_every_module_has_the_rank_of_its_block():
    shares = {"layers.0": 0.25, "layers.1": 0.75}
    found = ranks_by_module(shares, "model.layers", ["model.layers.0.mlp.up", "model.layers.1.o"], 8)
    assert found == {"model.layers.0.mlp.up": 12, "model.layers.1.o": 4}
    with pytest.raises(UsageError, match="follows what an allocator gave every block"):
        ranks_by_module({"layers.0": 0.5}, "model.layers", ["model.layers.0.o", "model.layers.1.o"], 8)


def test_adapters_get_these_ranks_and_keep_their_scale(make_llama, tiny_tokenizer, monkeypatch):
    from secateur.healing.recovery import trained

    shapes = {}
    build = trained.Lora.__init__

    def watched(self, *args, **kwargs):
        build(self, *args, **kwargs)
        layers = {n: m for n, m in self._model.named_modules() if hasattr(m, "lora_A")}
        shapes.update({n: (m.r["recovery"], m.scaling["recovery"]) for n, m in layers.items()})

    monkeypatch.setattr(trained.Lora, "__init__", watched)
    made = sc.prune(
        make_llama(num_hidden_layers=4),
        tiny_tokenizer,
        method="cfsp",
        sparsity=0.4,
        allocate="cfsp:alpha=10",
        samples=4,
        length=32,
        heal="lora:ranks=importance,rank=4,alpha=8,steps=1,batch=1,length=32",
    )
    shares = made.plan.provenance[0].allocation.sparsities
    expected = guided_ranks([1 - share for share in shares.values()], 4)
    assert len(set(expected)) > 1 and sum(expected) == 16
    for name, (rank, scaling) in shapes.items():
        assert rank == expected[int(name.split(".")[2])] and scaling == 2.0
    assert made.plan.provenance[0].recoveries[0].options["ranks"] == "importance"


# -- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sparsity": 1.0}, OptionError, r"sparsity must lie in \[0, 1\)"),
        ({"sparsity": 0.99, "budget": "neurons"}, BudgetError, "can't leave: at most 97.5% can"),
        ({"sparsity": 0.7}, BudgetError, "of the heads and neurons can't leave"),
        # half of one bundle rounds to none of it
        ({"sparsity": 0.6, "budget": "neurons", "round_to": 40}, BudgetError, "neurons can't leave: at most 0.0% can"),
        ({"metric": "three"}, OptionError, "metric must be one of"),
        ({"c": 0.0}, OptionError, "c must lie in"),
    ],
)
def test_mistakes_in_a_sentence(options, error, message):
    with pytest.raises(error, match=message):
        plan_for("cfsp", make_tiny("llama"), IDS, **options)


def test_ranks_that_follow_nothing_are_refused_before_anything_is_done():
    for step in ({"method": "flap"}, {"method": "wanda", "allocate": "owl"}):
        with pytest.raises(UsageError, match="follows what an allocator gave every block"):
            make_recipe({"steps": [{**step, "heal": "lora:ranks=importance"}]}, "test").check_methods()
    make_recipe({"steps": [{"method": "cfsp", "heal": "lora:ranks=importance"}]}, "test").check_methods()


def test_a_model_without_ffns_that_are_known(make_llama):
    model = make_llama()
    model.config.model_type = "mixtral"
    with pytest.raises(sc.errors.SecateurError, match="heads and neurons of model type 'mixtral' are unknown"):
        plan_for("cfsp", model, IDS, sparsity=0.3)


@pytest.mark.parametrize("method", ["cfsp", "prunenet"])
def test_a_model_that_has_lost_its_ffns_is_known(method):
    model = make_tiny("llama")
    cut = sc.apply(plan_without(model, [f"layers.{layer}.mlp" for layer in range(3)]), model)
    with pytest.raises(UnsupportedModelError, match=f"{method} removes FFN neurons, and this .* has none left"):
        plan_for(method, cut, IDS, sparsity=0.3)
