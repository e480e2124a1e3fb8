"""What every registered method must do, on every layout of decoders: a new one is tested before its author begins."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

import secateur as sc
from families import FAMILY_CONFIGS, LAYOUTS, make_tiny, tiny_ids
from runs import plan_for
from secateur.errors import OptionError
from secateur.methods import (
    LayerMethod,
    SearchMethod,
    StructuredMethod,
    SublayerMethod,
    SupernetMethod,
    TrainingMethod,
    WeightMethod,
    get_method,
    list_methods,
    make_method,
)
from secateur.methods.descriptor import DESCRIPTOR_VALUES
from secateur.models.decoders import decoder_anatomy
from secateur.plans import Plan
from secateur.report.build import removed_fraction

EVERY = list_methods()
# those for traced networks, for training and for caches have tests of their own beside this file
METHODS = [m for m in EVERY if not get_method(m).instead]
WEIGHTS = [m for m in METHODS if issubclass(get_method(m), WeightMethod)]
SEARCHED = [m for m in METHODS if issubclass(get_method(m), SearchMethod)]
UNITS = [m for m in METHODS if issubclass(get_method(m), StructuredMethod)]
LAYERS = [m for m in METHODS if issubclass(get_method(m), LayerMethod)]
SUBLAYERS = [m for m in METHODS if issubclass(get_method(m), SublayerMethod)]
STRUCTURED = UNITS + LAYERS
IDS = tiny_ids()


# what of a family is no matter of the method is seen with these on all of them
ON_ALL = {"wanda", "magnitude", "flap", "minitron", "shortgpt"}


def on_families(methods):
    """Every method on every layout, and some on every family."""
    assert set(METHODS) >= ON_ALL and set(LAYOUTS) <= set(FAMILY_CONFIGS)
    pairs = [(m, family) for family in FAMILY_CONFIGS for m in methods if family in LAYOUTS or m in ON_ALL]
    return pytest.mark.parametrize(("method", "family"), pairs, ids=["-".join(pair) for pair in pairs])


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def same_plan_bytes(first: Plan, second: Plan, folder):
    first.save(folder / "a")
    second.save(folder / "b")
    return all(
        (folder / "a" / name).read_bytes() == (folder / "b" / name).read_bytes()
        for name in ("plan.json", "plan.safetensors")
    )


@pytest.mark.parametrize("method", EVERY)
def test_default_constructible_with_a_complete_descriptor(method):
    made = make_method(method)
    assert made.name == method
    for field, allowed in DESCRIPTOR_VALUES.items():
        assert getattr(made.descriptor, field) in allowed
    # synaptic flow comes from the network alone
    needed = {*getattr(made, "needs", ()), *(made.needed() if isinstance(made, TrainingMethod) else ())} - {"flow"}
    looks_at_data = made.uses_data or bool(made.statistics) or bool(needed)
    assert looks_at_data == (made.descriptor.data != "none")
    assert all(f.metadata["help"] for f in type(made).option_fields().values())


@pytest.mark.parametrize("method", EVERY)
def test_every_bounded_option_refuses_what_lies_outside(method):
    for name, field in get_method(method).option_fields().items():
        meta = field.metadata
        bad = [float("nan")] if any(meta[b] is not None for b in ("ge", "gt", "le", "lt")) else []
        bad += [meta["ge"] - 1] if meta["ge"] is not None else []
        bad += [meta["gt"]] if meta["gt"] is not None else []
        bad += [meta["le"] + 1] if meta["le"] is not None else []
        bad += [meta["lt"]] if meta["lt"] is not None else []
        bad += ["no such choice"] if meta["choices"] else []
        for value in bad:
            with pytest.raises(OptionError, match=name):
                make_method(method, {name: value})


@pytest.mark.parametrize("method", METHODS)
def test_sparsity_zero_is_the_identity(method):
    model = make_tiny("llama")
    plan = plan_for(method, model, IDS, sparsity=0.0)
    assert plan.is_identity
    assert torch.equal(logits(sc.apply(plan, model)), logits(model))


@pytest.mark.parametrize("method", METHODS)
def test_same_arguments_give_the_same_bytes_and_leave_the_model_alone(method, tmp_path):
    model = make_tiny("llama")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    config = model.config.to_dict()
    plans = [plan_for(method, model, IDS, sparsity=0.4) for _ in range(2)]
    assert same_plan_bytes(*plans, tmp_path)
    sc.apply(plans[0], model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert model.config.to_dict() == config


@pytest.mark.parametrize("method", METHODS)
def test_plan_survives_the_disk_unchanged(method, tmp_path):
    plan = plan_for(method, make_tiny("llama"), IDS, sparsity=0.4)
    loaded = Plan.load(plan.save(tmp_path / "plan"))
    assert loaded.provenance == plan.provenance and not plan.diff(loaded)
    for part in ("keep", "masks", "values", "biases"):
        mine, theirs = getattr(plan, part), getattr(loaded, part)
        assert set(mine) == set(theirs) and all(torch.equal(mine[n], theirs[n]) for n in mine)


@functools.cache
def model_plan_and_cut(method: str, family: str):
    """A model, a plan and the cut model, to be read only.

    A sparsity of 0.35 leaves MLPs some neurons where attention can lose nothing.
    """
    model = make_tiny(family)
    plan = plan_for(method, model, IDS, sparsity=0.35)
    return model, plan, sc.apply(plan, model)


@pytest.mark.parametrize("parts", ["heads", "mlp"])
@pytest.mark.parametrize("method", UNITS)
def test_parts_say_what_may_leave_and_give_the_whole_budget(method, parts):
    model = make_tiny("llama", num_attention_heads=8, num_key_value_heads=8, head_dim=4, num_hidden_layers=4)
    if parts == "heads" and get_method(method).removes == ("neuron",):
        with pytest.raises(
            OptionError, match=f"{method} removes FFN neurons alone, so nothing leaves with parts=heads"
        ):
            make_method(method, {"parts": parts})
        return
    anatomy = sc.anatomy(model)
    window = {name: 0 for name in ("first", "last") if name in get_method(method).option_fields()}
    plan = plan_for(method, model, IDS, sparsity=0.2, parts=parts, heads="kv", **window)
    lost = {anatomy[name].kind for name in plan.keep if len(plan.removed(name))}
    assert lost == {"heads": {"kv_head"}, "mlp": {"neuron"}}[parts]
    # by half a unit of every layer at most
    unit = max(group.cost.params for group in anatomy.of_kind(*lost))
    assert abs(removed_fraction(plan, anatomy) - 0.2) * anatomy.blocks.params <= anatomy.num_layers * unit / 2


@on_families(STRUCTURED)
def test_masked_model_equals_cut_model_on_every_family(method, family):
    model, plan, cut = model_plan_and_cut(method, family)
    assert any(len(plan.removed(name)) for name in plan.keep)
    masked = sc.apply(plan, model, mask=True)
    difference = float((logits(masked) - logits(cut)).abs().max())
    inexact = [g for g in decoder_anatomy(model) if g.inexact and g.name in plan.keep and len(plan.removed(g.name))]
    if inexact:
        # strict: a group that declares itself inexact must really differ, or the declaration is wrong
        assert difference > 1e-3, inexact[0].inexact
    else:
        assert difference < 1e-4
    assert float((logits(cut) - logits(model)).abs().max()) > 1e-3


# what becomes of a model without sub-layers, on every family, is in tests/models/test_sublayers.py
@pytest.mark.parametrize("method", SUBLAYERS)
@pytest.mark.parametrize("family", ["llama-tied-bias", "opt", "falcon-alibi", "gpt2"])
def test_as_many_sub_layers_leave_as_are_asked_for(method, family):
    model = make_tiny(family)
    anatomy = decoder_anatomy(model)
    plan = plan_for(method, model, IDS, sparsity=0.35)
    assert plan.keep
    masked, cut = sc.apply(plan, model, mask=True), sc.apply(plan, model)
    assert float((logits(masked) - logits(cut)).abs().max()) < 1e-4
    assert float((logits(cut) - logits(model)).abs().max()) > 1e-3
    largest = max(g.units * g.cost.macs for g in anatomy if g.reader)
    assert abs(removed_fraction(plan, anatomy) - 0.35) <= largest / anatomy.blocks.macs / 2


@on_families(UNITS)
def test_query_heads_leave_every_key_value_group_alike(method, family):
    model = make_tiny(family)
    plan = plan_for(method, model, IDS, sparsity=0.25, heads="query", round_to=2)
    masked, cut = sc.apply(plan, model, mask=True), sc.apply(plan, model)
    anatomy = decoder_anatomy(model, heads="query")
    # which kinds leave may follow from the options
    heads = anatomy.of_kind("head") if "head" in make_method(method, {"sparsity": 0.25}).kinds else []
    for group in heads:
        per_kv = torch.bincount(plan.keep[group.name] // (group.units // group.balance), minlength=group.balance)
        assert len(set(per_kv.tolist())) == 1
    if not any(g.inexact and len(plan.removed(g.name)) for g in heads):
        assert float((logits(masked) - logits(cut)).abs().max()) < 1e-4


def zeros(model, matrix) -> torch.Tensor:
    """Which weights are zero, [outputs, inputs] bool."""
    weight = model.get_parameter(matrix.tensor)
    return (weight.T if matrix.transposed else weight) == 0


@on_families(WEIGHTS)
def test_weight_methods_reach_their_sparsity_in_every_matrix(method, family):
    model = make_tiny(family)
    plan = plan_for(method, model, IDS, sparsity=0.5)
    matrices = decoder_anatomy(model).matrices
    assert len(plan.masks) == len(matrices)
    pruned = sc.apply(plan, model)
    assert torch.isfinite(logits(pruned)).all()
    if get_method(method).descriptor.allocation != "uniform":
        # matrices compete, and the sparsity is that of all together
        kept = sum(int(mask.sum()) for mask in plan.masks.values())
        assert abs(kept / sum(mask.numel() for mask in plan.masks.values()) - 0.5) < 1e-3
        return
    for matrix in matrices:
        share = float(zeros(pruned, matrix).float().mean())
        assert abs(share - 0.5) <= 1.0 / matrix.shape[1] + 1e-9, matrix.module


# a pattern follows the rows: of matrices as they are, fused ones, transposed ones, and fused ones in turns by head
@pytest.mark.parametrize("method", WEIGHTS)
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "falcon"])
def test_weight_methods_keep_their_pattern_in_every_row(method, family):
    model = make_tiny(family)
    plan = plan_for(method, model, IDS, pattern="2:4")
    matrices = decoder_anatomy(model).matrices
    assert len(plan.masks) == len(matrices)
    pruned = sc.apply(plan, model)
    assert torch.isfinite(logits(pruned)).all()
    for matrix in matrices:
        assert (zeros(pruned, matrix).reshape(matrix.shape[0], -1, 4).sum(dim=2) == 2).all(), matrix.module


@pytest.mark.parametrize("method", SEARCHED)
@pytest.mark.parametrize("family", ["llama", "opt", "falcon"])
def test_searched_masks_keep_their_number_in_every_matrix(method, family):
    model = make_tiny(family)
    plan = plan_for(method, model, IDS, sparsity=0.5)
    assert len(plan.masks) == len(decoder_anatomy(model).matrices)
    for name, mask in plan.masks.items():
        assert int(mask.sum()) == mask.numel() // 2, name
    assert torch.isfinite(logits(sc.apply(plan, model))).all()


def _offers_global(method: str) -> bool:
    scope = get_method(method).option_fields().get("scope")
    return scope is not None and "global" in scope.metadata["choices"]


GLOBAL = [m for m in WEIGHTS if _offers_global(m)]


@pytest.mark.parametrize("method", GLOBAL)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_global_scope_removes_exactly_the_share_of_all_matrices_together(method, family):
    model = make_tiny(family)
    with torch.no_grad():
        for matrix in decoder_anatomy(model).matrices:
            # a coarse grid, so that the threshold falls among many equal weights
            weight = model.get_parameter(matrix.tensor)
            weight.copy_((weight * 10).round() / 10)
    plan = plan_for(method, model, IDS, sparsity=0.45, scope="global")
    total = sum(mask.numel() for mask in plan.masks.values())
    assert sum(int((~mask).sum()) for mask in plan.masks.values()) == int(total * 0.45)
    assert len({round(plan.sparsity(name), 3) for name in plan.masks}) > 1
    pruned = sc.apply(plan, model)
    assert all(not pruned.get_parameter(name)[~mask].any() for name, mask in plan.masks.items())


@pytest.mark.parametrize("method", UNITS)
@pytest.mark.parametrize("budget", ["params", "macs", "bytes"])
def test_unit_methods_meet_their_budget_within_one_bundle(method, budget):
    model = make_tiny("qwen3")
    anatomy = decoder_anatomy(model, heads=getattr(make_method(method), "heads", "kv"))
    coarsest = max(getattr(g.cost, budget) * g.balance for g in anatomy.of_kind("kv_head", "head", "neuron"))
    for sparsity in (0.1, 0.3, 0.5):
        plan = plan_for(method, model, IDS, sparsity=sparsity, budget=budget)
        gone = sum(getattr(anatomy[n].cost, budget) * len(plan.removed(n)) for n in plan.keep)
        total = getattr(anatomy.blocks, budget)
        assert abs(gone - sparsity * total) <= coarsest / 2 + 1
        if budget == "params":
            assert removed_fraction(plan, anatomy) == pytest.approx(gone / total, abs=1e-6)


@pytest.mark.parametrize("method", UNITS)
def test_rounding_and_minimum_are_respected(method):
    model = make_tiny("llama")
    plan = plan_for(method, model, IDS, sparsity=0.3, round_to=8, min_keep=2)
    for name, kept in plan.keep.items():
        assert len(kept) >= 2
        if name.endswith("mlp"):
            assert len(kept) % 8 == 0


# a mask changes no shape, so that one method which zeroes weights stands for all
@on_families([*STRUCTURED, "magnitude"])
def test_cut_models_generate_with_the_cache_as_without(method, family):
    _, _, cut = model_plan_and_cut(method, family)
    prompt = IDS[:2, :8]
    with torch.no_grad():
        written = cut.generate(prompt, max_new_tokens=10, min_new_tokens=10, do_sample=False)
        steps = cut(written).logits[:, 7:-1]
        # min_new_tokens bans the end token
        steps[..., 2] = float("-inf")
        assert torch.equal(written[:, 8:], steps.argmax(-1))


# the blocks behind a supernet see what all levels of those before give, and not what is cut in the end
SEQUENTIAL = [m for m in METHODS if get_method(m).sequential and not issubclass(get_method(m), SupernetMethod)]


@pytest.mark.parametrize("method", SEQUENTIAL)
def test_sequential_methods_calibrate_later_blocks_on_the_pruned_ones(method):
    """Pruning the first block beforehand, alike, must leave the decisions about the second one as they are."""
    model = make_tiny("llama")
    plan = plan_for(method, model, IDS, sparsity=0.4)
    first = sc.apply(_only_first_layer(plan), model, mask=True)
    names = [n for n in (*plan.masks, *plan.keep) if ".1." in n]
    assert names
    dense_statistics = plan_for(method, _with_dense_calibration(model, plan), IDS, sparsity=0.4)
    again = plan_for(method, first, IDS, sparsity=0.4)
    for name in names:
        assert torch.equal(_decided(plan, name), _decided(again, name)), name
    assert any(not torch.equal(_decided(plan, n), _decided(dense_statistics, n)) for n in names)


def _decided(plan: Plan, name: str) -> torch.Tensor:
    return plan.masks[name] if name in plan.masks else plan.keep[name]


def _with_dense_calibration(model, plan: Plan):
    """The model with another first block, so that the second one sees other inputs."""
    other = make_tiny("llama", seed=5)
    other.load_state_dict({**model.state_dict(), **{k: v for k, v in other.state_dict().items() if ".layers.0." in k}})
    return other


def _only_first_layer(plan: Plan) -> Plan:
    """The part of a plan that decides the first block."""
    parts = {
        part: {n: v for n, v in getattr(plan, part).items() if ".0." in n}
        for part in ("groups", "keep", "masks", "values", "biases")
    }
    return dataclasses.replace(plan, **parts, scores={})


def test_a_method_without_a_descriptor_is_refused():
    from secateur.methods import Method, register

    with pytest.raises(TypeError, match="no descriptor"):
        register("undescribed")(type("Undescribed", (Method,), {}))
    assert "undescribed" not in list_methods()
