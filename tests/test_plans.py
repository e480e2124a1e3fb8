"""The plan: immutable, validated, round-trips, compares, merges, and fits one model only."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import secateur as sc
from families import make_tiny, tiny_ids
from runs import plan_for
from secateur.errors import OutputError, PlanError, PlanMismatchError
from secateur.plans import Plan, pack_bits, unpack_bits
from secateur.provenance import Fingerprint, Provenance

IDS = tiny_ids()


def provenance(shapes="s"):
    model = Fingerprint(architecture="A", shapes=shapes, weights="w", num_layers=2, name="tiny")
    return (Provenance(method="test", model=model),)


def keep(*units):
    return torch.tensor(units, dtype=torch.int64)


@given(st.lists(st.booleans(), min_size=1, max_size=70))
def test_bits_survive_packing(bits):
    mask = torch.tensor(bits)
    assert torch.equal(unpack_bits(pack_bits(mask), (len(bits),)), mask)


def test_bits_are_packed_least_significant_first():
    mask = torch.zeros(9, dtype=torch.bool)
    mask[0] = mask[3] = mask[8] = True
    assert pack_bits(mask).tolist() == [0b1001, 1]


@given(st.integers(1, 5), st.integers(0, 2**16))
@settings(max_examples=20, deadline=None)
def test_disk_is_the_identity(units, seed):
    import tempfile

    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(3, units, generator=generator) > 0.5
    plan = Plan(
        provenance=provenance(),
        groups={"g": units},
        keep={"g": torch.arange(units)[torch.rand(units, generator=generator) > 0.3]},
        masks={"m.weight": mask},
        values={"m.weight": torch.randn(int(mask.sum()), generator=generator).to(torch.bfloat16)},
        biases={"m.bias": torch.randn(3, generator=generator)},
        scores={"g": torch.randn(units, generator=generator)},
    )
    with tempfile.TemporaryDirectory() as folder:
        loaded = Plan.load(plan.save(f"{folder}/plan"))
    assert loaded.provenance == plan.provenance and dict(loaded.groups) == dict(plan.groups)
    for part in ("keep", "masks", "values", "biases", "scores"):
        mine, theirs = getattr(plan, part), getattr(loaded, part)
        assert all(torch.equal(mine[n], theirs[n]) and mine[n].dtype == theirs[n].dtype for n in mine)
    assert not plan.diff(loaded)


def test_plans_cannot_be_changed():
    plan = Plan(provenance=provenance(), groups={"g": 2}, keep={"g": keep(0)})
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.keep = {}
    with pytest.raises(TypeError):
        plan.keep["g"] = keep(1)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"groups": {"g": 2}, "keep": {"g": keep(1, 0)}}, "ascending"),
        ({"groups": {"g": 2}, "keep": {"g": keep(0, 2)}}, r"lie in \[0, 2\)"),
        ({"groups": {"g": 2}, "keep": {"g": torch.tensor([0.5])}}, "list of integers"),
        ({"groups": {"g": 2}, "keep": {}}, "without kept units"),
        ({"masks": {"m": torch.ones(2)}}, "must be boolean"),
        ({"values": {"m": torch.ones(2)}}, "don't match its mask"),
        ({"masks": {"m": torch.ones(2, dtype=torch.bool)}, "values": {"m": torch.full((2,), torch.nan)}}, "NaN"),
        ({"biases": {"b": torch.tensor([torch.inf])}}, "finite"),
        ({"provenance": ()}, "needs a provenance"),
        ({"provenance": provenance("a") + provenance("b")}, "one model"),
    ],
)
def test_parts_that_do_not_fit_are_refused(parts, message):
    with pytest.raises(PlanError, match=message):
        Plan(**{"provenance": provenance(), **parts})


def damaged(tmp_path, change):
    plan = plan_for("flap", make_tiny("llama"), IDS, sparsity=0.3)
    folder = plan.save(tmp_path / "plan")
    change(folder)
    return folder


def edit(**changes):
    def change(folder):
        path = folder / "plan.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "plan.json").unlink(), "no plan.json"),
        (lambda f: (f / "plan.safetensors").unlink(), "no plan.safetensors"),
        (lambda f: (f / "plan.json").write_text("{"), "not valid JSON"),
        (lambda f: (f / "plan.json").write_text("[]"), "plan format None"),
        (edit(format_version=99), "plan format 99; this secateur reads format 1"),
        (edit(surprise=1), "surprise: extra inputs are not permitted"),
        (edit(groups={}), "kept units of no group"),
        (edit(masks={"m.weight": [2, 2]}), "the mask of m.weight is missing"),
        (lambda f: (f / "plan.safetensors").write_bytes(b"\x00" * 40), "is corrupt"),
    ],
)
def test_damaged_folders_are_refused_in_one_sentence(tmp_path, change, message):
    with pytest.raises(PlanError, match=message) as caught:
        Plan.load(damaged(tmp_path, change))
    assert "\n" not in str(caught.value)


def test_an_existing_folder_is_not_overwritten(tmp_path):
    plan = Plan(provenance=provenance(), groups={"g": 2}, keep={"g": keep(0)})
    plan.save(tmp_path / "plan")
    with pytest.raises(OutputError, match="--overwrite"):
        plan.save(tmp_path / "plan")
    plan.save(tmp_path / "plan", overwrite=True)


def test_diff_counts_what_only_one_of_them_keeps():
    first = Plan(provenance=provenance(), groups={"g": 4, "h": 2}, keep={"g": keep(0, 1), "h": keep(0)})
    second = Plan(provenance=provenance(), groups={"g": 4, "h": 2}, keep={"g": keep(1, 2, 3), "h": keep(0)})
    assert dict(first.diff(second).rows) == {"g": (1, 1, 2)}
    assert not first.diff(first)


def test_diff_of_plans_for_other_shapes_is_refused():
    with pytest.raises(PlanError, match="different shapes"):
        Plan(provenance=provenance("a")).diff(Plan(provenance=provenance("b")))


def test_diff_of_other_units_is_refused():
    model = make_tiny("llama")
    by_heads = [plan_for("flap", model, IDS, sparsity=0.4, heads=heads) for heads in ("kv", "query")]
    with pytest.raises(PlanError, match=r"one plan has 2 units in layers\.\d\.attention and the other 4"):
        by_heads[0].diff(by_heads[1])
    turned = [plan_for("slicegpt", model, IDS, sparsity=sparsity) for sparsity in (0.3, 0.2)]
    with pytest.raises(PlanError, match="bases of their own"):
        turned[0].diff(turned[1])
    assert not turned[0].diff(turned[0])


@pytest.mark.filterwarnings("ignore:the plan was made for other weights")
def test_merge_applies_both_and_refuses_overlap():
    model = make_tiny("llama")
    units = plan_for("magnitude_sp", model, IDS, sparsity=0.3)
    weights = plan_for("magnitude", model, IDS, sparsity=0.5)
    both = units.merge(weights)
    assert both.method == "magnitude_sp+magnitude"
    cut = sc.apply(both, model)
    separately = sc.apply(units, sc.apply(weights, model))
    for (name, one), (_, other) in zip(cut.named_parameters(), separately.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    with pytest.raises(PlanError, match="both plans decide group"):
        units.merge(units)


def test_biases_add_up_when_merging():
    one = Plan(provenance=provenance(), biases={"b": torch.ones(2)})
    assert one.merge(Plan(provenance=provenance(), biases={"b": torch.ones(2)})).biases["b"].tolist() == [2, 2]


def test_a_plan_for_other_shapes_is_refused():
    plan = plan_for("flap", make_tiny("llama"), IDS, sparsity=0.3)
    with pytest.raises(PlanMismatchError, match=r"doesn't fit .* other shapes") as caught:
        sc.apply(plan, make_tiny("llama", intermediate_size=48))
    assert "\n" not in str(caught.value)


def test_a_plan_for_other_weights_warns():
    plan = plan_for("flap", make_tiny("llama"), IDS, sparsity=0.3)
    with pytest.warns(UserWarning, match="other weights"):
        sc.apply(plan, make_tiny("llama", seed=3))


def test_inplace_cuts_the_given_model():
    model = make_tiny("llama")
    before = sum(p.numel() for p in model.parameters())
    plan = plan_for("magnitude_sp", model, IDS, sparsity=0.3)
    assert sc.apply(plan, model, inplace=True) is model
    assert sum(p.numel() for p in model.parameters()) < before
