"""``heal=refit`` on whole models: what it solves, what it sees, and that every method can have it."""

from __future__ import annotations

import pytest
import torch

import secateur as sc
from families import make_tiny
from refit_reference import DOUBLE, IDS, inputs_of, refitted
from runs import plan_for
from secateur.engine import decide
from secateur.errors import DataError, NonFiniteError, OptionError
from secateur.healing import Refit, with_statistics
from secateur.healing.refit import STREAM_SHARE
from secateur.methods import Refittable, StructuredMethod, WeightMethod, get_method, list_methods, make_method
from secateur.models.decoders import decoder_anatomy
from secateur.models.sources import Source
from secateur.observe import Cross, Gram, Lost, Moments, SumSquares
from secateur.observe.driver import BlockWalk
from secateur.plans import Plan
from secateur.report.build import removed_fraction

WEIGHTS = [m for m in list_methods() if issubclass(get_method(m), WeightMethod)]
REFITTABLE = [m for m in list_methods() if issubclass(get_method(m), Refittable)]
UNITS = [m for m in REFITTABLE if issubclass(get_method(m), StructuredMethod)]


@pytest.fixture(scope="module")
def model():
    """Float64, so that what is compared differs by rounding only."""
    return make_tiny("llama").double()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def only(plan: Plan, part: str) -> Plan:
    """The part of a plan about one block."""
    from dataclasses import replace

    kinds = ("groups", "keep", "masks", "values", "biases")
    return replace(plan, **{k: {n: v for n, v in getattr(plan, k).items() if part in n} for k in kinds}, scores={})


@pytest.mark.parametrize("target", ["current", "stream", "dense"])
def test_a_refit_solves_for_what_the_mask_keeps(model, target):
    plan = plan_for("magnitude", model, IDS, dtype=DOUBLE, sparsity=0.5, heal="refit", target=target)
    plain = plan_for("magnitude", model, IDS, sparsity=0.5)
    names = ["model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
    # the second block is dense while it is observed, behind the first one as it is cut
    behind = sc.apply(only(plan, ".0."), model)
    now, dense = inputs_of(behind, names), inputs_of(model, names)
    cut = sc.apply(plan, model)
    for name in names:
        tensor = f"{name}.weight"
        w, keep = model.get_parameter(tensor), plan.masks[tensor]
        assert torch.equal(keep, plain.masks[tensor])
        wanted = (dense if target == "dense" else now)[name] @ w.T
        if target == "stream" and name.endswith("down_proj"):
            # some of what the first block, as it is cut, has lost of what the second, which is dense, gives
            wanted = wanted + lost(model, behind) * STREAM_SHARE
        torch.testing.assert_close(
            cut.get_parameter(tensor), refitted(w, keep, now[name], wanted), rtol=1e-6, atol=1e-8
        )


def lost(model, behind):
    """What the second block gives in one model and not in the other, [tokens, hidden]."""
    found = []
    for one in (model, behind):
        handle = one.model.layers[1].register_forward_hook(lambda m, args, out: found.append(out.flatten(0, 1)))
        logits(one)
        handle.remove()
    return (found[0] - found[1]).detach()


def test_columns_and_bias_make_up_for_the_stream(model):
    options = {"dtype": DOUBLE, "sparsity": 0.3, "heal": "refit"}
    plan = plan_for("flap", model, IDS, target="stream", **options)
    name = "model.layers.1.mlp.down_proj"
    behind = sc.apply(only(plan, ".0."), model)
    x, w = inputs_of(behind, [name])[name], model.get_parameter(f"{name}.weight").detach()
    wanted = x @ w.T + lost(model, behind) * STREAM_SHARE
    kept = plan.keep["layers.1.mlp"]
    cut = sc.apply(plan, model).get_submodule(name).requires_grad_(False)
    wide = torch.cat([x[:, kept], torch.ones(len(x), 1, dtype=DOUBLE)], dim=1)
    best = (wanted - wide @ torch.linalg.lstsq(wide, wanted).solution).square().sum()
    assert float(best) <= float((wanted - cut(x[:, kept])).square().sum()) < 1.05 * float(best)
    torch.testing.assert_close(cut(x[:, kept]).mean(dim=0), wanted.mean(dim=0), rtol=0, atol=1e-5)
    # nothing is lost before the first block
    plain = plan_for("flap", model, IDS, **options)
    tensor = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(plan.values[tensor], plain.values[tensor])


def test_a_model_type_that_nobody_knows_is_fitted_to_the_inputs_as_they_are():
    model = make_tiny("llama")
    model.config.model_type = "unheard_of"
    for method, heal in (("wanda", "refit"), ("alps", "none")):
        plan, plain = (plan_for(method, model, IDS, heal=heal, target=t, sparsity=0.5) for t in ("stream", "current"))
        (note,) = set(plan.provenance[0].notes) - set(plain.provenance[0].notes)
        assert "model type unheard_of" in note and "target=current was taken" in note
        assert all(torch.equal(value, plain.values[name]) for name, value in plan.values.items())


@pytest.mark.parametrize(
    ("method", "options"),
    [("wanda", {}), ("magnitude", {"scope": "global"}), ("flap", {"sparsity": 0.2}), ("magnitude_sp", {})],
)
def test_a_target_where_nothing_is_fitted_is_told_of(method, options, model):
    plans = [plan_for(method, model, IDS, target=target, **options) for target in ("current", "dense")]
    plain, aimed = (plan.provenance[0].notes for plan in plans)
    assert set(aimed) - set(plain) == {
        f"target=dense: {method} fits nothing without heal=refit, so it had no part in this"
    }
    assert aimed.count(next(iter(set(aimed) - set(plain)))) == 1
    fitted = plan_for(method, model, IDS, target="dense", heal="refit", **options)
    assert not any("fits nothing" in note for note in fitted.provenance[0].notes)


@pytest.mark.parametrize(
    "family", ["gpt2", "gpt_neox", "falcon", "opt", "phi3", "gemma2", "gemma3", "olmo2", "granite"]
)
def test_the_stream_can_be_the_target_of_any_family(family):
    model = make_tiny(family)
    plans = [plan_for("wanda", model, IDS, sparsity=0.6, heal="refit", target=t) for t in ("current", "stream")]
    differ = {name for name, value in plans[0].values.items() if not torch.equal(value, plans[1].values[name])}
    # nothing is lost before the first block, and its last matrix is the only one to make up for something
    assert differ and not any(".0." in name for name in differ)


def error(model, pruned):
    return float((logits(model) - logits(pruned)).square().mean())


@pytest.mark.parametrize("method", WEIGHTS)
@pytest.mark.parametrize("options", [{"sparsity": 0.6}, {"pattern": "2:4"}])
def test_every_weight_method_can_be_refitted_and_gains(method, options, model):
    plans = {heal: plan_for(method, model, IDS, dtype=DOUBLE, heal=heal, **options) for heal in ("none", "refit")}
    first = [name for name in plans["none"].masks if ".layers.0." in name]
    assert all(torch.equal(plans["none"].masks[name], plans["refit"].masks[name]) for name in first)
    assert set(plans["refit"].values) == set(plans["refit"].masks)
    name = "model.layers.0.self_attn.o_proj"
    x, w = inputs_of(model, [name])[name], model.get_parameter(f"{name}.weight")

    def lost(plan):
        return float((x @ (w - sc.apply(plan, model).get_parameter(f"{name}.weight")).T).detach().square().sum())

    assert lost(plans["refit"]) < lost(plans["none"]) * 1.001


@pytest.mark.parametrize(
    ("method", "options"), [("magnitude", {"scope": "global"}), ("wanda", {"scope": "global"}), ("icbs", {})]
)
def test_masks_that_are_decided_for_the_whole_model_are_refitted_afterwards(method, options, model):
    plan = plan_for(method, model, IDS, dtype=DOUBLE, sparsity=0.5, heal="refit", **options)
    plain = plan_for(method, model, IDS, dtype=DOUBLE, sparsity=0.5, **options)
    assert all(torch.equal(mask, plain.masks[name]) for name, mask in plan.masks.items())
    assert set(plan.values) == set(plan.masks)
    assert error(model, sc.apply(plan, model)) < error(model, sc.apply(plain, model))


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
@pytest.mark.parametrize("method", UNITS)
def test_columns_that_stay_are_refitted_and_a_cut_model_is_the_masked_one(method, family):
    model = make_tiny(family)
    options = {"sparsity": 0.4, "round_to": 2}
    plain = plan_for(method, model, IDS, heal="none", **options)
    plan = plan_for(method, model, IDS, heal="refit", **options)
    anatomy = decoder_anatomy(model)
    first = [name for name in plan.keep if name.startswith("layers.0.")]
    assert first and all(torch.equal(plan.keep[name], plain.keep[name]) for name in first)
    cut = [anatomy[name].reader + ".weight" for name in plan.keep if len(plan.removed(name))]
    assert set(plan.values) == set(plan.masks) == set(cut)
    masked, small = sc.apply(plan, model, mask=True), sc.apply(plan, model)
    torch.testing.assert_close(logits(masked), logits(small), rtol=1e-4, atol=1e-4)
    # a column that leaves is no zero weight beside it
    assert removed_fraction(plan, anatomy) == pytest.approx(removed_fraction(plain, anatomy), abs=0.02)


def test_a_refit_of_columns_with_a_bias_fits_both(model):
    plan = plan_for("flap", model, IDS, dtype=DOUBLE, sparsity=0.3, heal="refit")
    name = "model.layers.0.mlp.down_proj"
    x, w = inputs_of(model, [name])[name], model.get_parameter(f"{name}.weight")
    kept = plan.keep["layers.0.mlp"]
    cut = sc.apply(plan, model).get_submodule(name)
    # the best that any weight and bias can do, but for the damping
    wide = torch.cat([x[:, kept], torch.ones(len(x), 1, dtype=DOUBLE)], dim=1)
    best = (x @ w.T - wide @ torch.linalg.lstsq(wide, x @ w.T).solution).detach().square().sum()
    found = (x @ w.T - cut(x[:, kept])).detach().square().sum()
    assert float(best) <= float(found) < 1.05 * float(best)
    # what is left is nothing that a bias could still take
    torch.testing.assert_close(cut(x[:, kept]).mean(dim=0), (x @ w.T).mean(dim=0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["wanda_sp", "magnitude_sp", "random_sp"])
def test_a_bias_keeps_the_mean_of_what_the_reader_gives(method, model):
    plan = plan_for(method, model, IDS, dtype=DOUBLE, sparsity=0.3, heal="bias")
    name = "model.layers.0.mlp.down_proj"
    x, w = inputs_of(model, [name])[name], model.get_parameter(f"{name}.weight")
    kept = plan.keep["layers.0.mlp"]
    given = x[:, kept] @ w[:, kept].T + plan.biases[f"{name}.bias"].double()
    torch.testing.assert_close(given.mean(dim=0), (x @ w.T).mean(dim=0), rtol=0, atol=1e-5)


def test_nothing_is_observed_twice_and_what_is_missing_is_added():
    assert set(make_method("sparsegpt", {"heal": "refit"}).observed_statistics()) == {"gram"}
    assert set(make_method("magnitude").observed_statistics()) == set()
    found = make_method("magnitude", {"heal": "refit", "target": "dense"}).observed_statistics()
    assert set(found.values()) == {Gram, Cross}
    assert set(make_method("alps", {"target": "stream"}).observed_statistics().values()) == {Gram, Lost}
    assert set(make_method("wanda", {"target": "stream"}).observed_statistics().values()) == {SumSquares}
    # the walk that decides takes what it did, and the later one what a refit needs
    flap = make_method("flap", {"heal": "refit"})
    assert flap.observed_statistics() == make_method("flap").observed_statistics()
    assert set(flap.refit_statistics().values()) == {Gram, Moments}
    assert with_statistics({"mine": Gram}, Gram, Moments) == {"mine": Gram, "heal.moments": Moments}


def test_the_second_stream_goes_through_the_dense_blocks(model):
    from secateur.observe.activations import Activations

    source = Source(model)
    walk = BlockWalk(source, IDS, dtype=DOUBLE, batch_tokens=64, dense=Activations())
    for layer in range(len(source.blocks)):
        block = walk.open(layer)
        seen = walk.observe(block, layer, ["self_attn.q_proj"], {"c": Cross, "g": Gram}, advance=False)
        with torch.no_grad():
            block.mlp.down_proj.weight.mul_(0.5)
        walk.advance(block, layer)
        now = walk.hidden
        cross, gram = seen["self_attn.q_proj"]["c"], seen["self_attn.q_proj"]["g"]
        assert torch.allclose(cross.total_CC, gram.total_CC) == (layer == 0)
    with torch.no_grad():
        states = model.model(IDS, output_hidden_states=True).hidden_states
    last = torch.cat([walk.dense[i] for i in range(len(walk.dense))])
    torch.testing.assert_close(model.model.norm(last), states[-1])
    assert not torch.allclose(last, torch.cat([now[i] for i in range(len(now))]))


def test_little_data_is_said_once(model):
    plan = plan_for("wanda", model, IDS[:2], heal="refit", sparsity=0.5)
    assert len([note for note in plan.provenance[0].notes if "weights of an output" in note]) == 1
    from secateur.healing.refit import few_tokens

    assert few_tokens(400, 100) == ()
    assert "399 calibration tokens for 100 weights" in few_tokens(399, 100)[0]


def test_a_dead_input_stops_nothing():
    x = torch.randn(1, 50, 6, generator=torch.Generator().manual_seed(0))
    x[..., 2] = 0
    gram, cross = Gram(), Cross()
    gram.update(x)
    cross.update_pair(x, x)
    w = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    keep = torch.ones(4, 6, dtype=torch.bool)
    keep[:, 0] = False
    for seen in ({"g": gram}, {"g": gram, "c": cross}):
        found, notes = Refit().weights("m", w, keep, seen)
        assert torch.isfinite(found).all() and notes == ()
        torch.testing.assert_close(found[:, 2], w[:, 2])


def test_what_float16_cannot_hold_is_not_passed_on():
    """Of two equal neurons the one that stays takes over the other's column; float16 ends at 65,504."""
    model = make_tiny("llama").half()
    mlp = model.model.layers[2].mlp
    with torch.no_grad():
        for writer in (mlp.gate_proj, mlp.up_proj):
            writer.weight[1::2] = writer.weight[::2]
        mlp.down_proj.weight.fill_(40000)
    with pytest.raises(NonFiniteError, match=r"layer 2, model.layers.2.mlp.down_proj: \d+ of \d+ compensated weights"):
        plan_for("osscar", model, IDS, dtype=torch.float32, sparsity=0.3)


def test_what_a_method_cannot_do_is_refused():
    with pytest.raises(OptionError, match="heal must be one of none, refit, got 'bias'"):
        make_method("wanda", {"heal": "bias"})
    with pytest.raises(DataError, match="magnitude with heal=refit needs calibration data"):
        decide(
            make_method("magnitude", {"heal": "refit"}), Source(make_tiny("llama")), None,
            dtype=DOUBLE, batch_tokens=64, progress=lambda *_: None,
        )  # fmt: skip
    with pytest.raises(OptionError, match="shortgpt takes no heal"):
        sc.plan(make_tiny("llama"), method="shortgpt", heal="refit")
