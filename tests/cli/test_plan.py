import json

import pytest
import torch

from secateur.errors import PlanError
from secateur.plans import Plan, find_plans
from secateur.provenance import Fingerprint, Provenance

MODEL = Fingerprint(architecture="llama", shapes="s", weights="w", num_layers=2)


def make_plan(method="flap", groups=None, masks=None) -> Plan:
    groups = groups or {}
    return Plan(
        provenance=(Provenance(method=method, model=MODEL),),
        groups={name: 4 for name in groups},
        keep={name: torch.tensor(kept) for name, kept in groups.items()},
        masks={name: torch.tensor(mask, dtype=torch.bool) for name, mask in (masks or {}).items()},
    )


@pytest.fixture
def two_plans(tmp_path):
    first = make_plan(groups={"layers.0.mlp": [0, 1]}).save(tmp_path / "first")
    second = make_plan(groups={"layers.0.mlp": [1, 2, 3]}).save(tmp_path / "second")
    return first, second


def test_show_counts_kept_and_removed(cli, two_plans):
    (plan,) = json.loads(cli("plan", "show", two_plans[0], "--json").out)["plans"]
    assert plan["groups"] == {"layers.0.mlp": {"units": 4, "kept": 2, "removed": [2, 3]}}
    assert "2/4" in cli("plan", "show", two_plans[0]).out


def test_diff_counts_units(cli, two_plans):
    rows = json.loads(cli("plan", "diff", *two_plans, "--json").out)
    assert rows == {"layers.0.mlp": {"both": 1, "only_first": 1, "only_second": 2}}
    assert "layers.0.mlp" in cli("plan", "diff", *two_plans).out
    assert json.loads(cli("plan", "diff", two_plans[0], two_plans[0], "--json").out) == {}


def test_merge_joins_plans_for_different_parts(cli, two_plans, tmp_path):
    masks = make_plan("wanda", masks={"a.weight": [[True, False]]}).save(tmp_path / "masks")
    run = cli("plan", "merge", two_plans[0], masks, "--out", tmp_path / "merged")
    assert run.code == 0 and str(tmp_path / "merged") in run.out
    merged = Plan.load(tmp_path / "merged")
    assert merged.method == "flap+wanda"
    assert set(merged.keep) == {"layers.0.mlp"} and set(merged.masks) == {"a.weight"}


def test_merge_of_overlapping_plans_writes_nothing(cli, two_plans, tmp_path):
    run = cli("plan", "merge", *two_plans, "--out", tmp_path / "merged")
    assert run.code == 1
    assert "both plans decide group layers.0.mlp" in run.err
    assert not (tmp_path / "merged").exists()


def test_merge_refuses_an_output_that_exists(cli, two_plans):
    assert cli("plan", "merge", *two_plans, "--out", two_plans[0]).code == 1
    assert Plan.load(two_plans[0]).keep["layers.0.mlp"].tolist() == [0, 1]


def test_plans_are_found_in_the_order_of_their_steps(tmp_path):
    for number in (1, 2, 10):
        make_plan().save(tmp_path / "plan" / f"step-{number}")
    found = [path.name for path in find_plans(tmp_path)]
    assert found == ["step-1", "step-2", "step-10"]
    assert find_plans(tmp_path / "plan" / "step-2") == [tmp_path / "plan" / "step-2"]


def test_one_of_several_steps_must_be_named(cli, tmp_path, two_plans):
    for number in (1, 2):
        make_plan().save(tmp_path / "c" / "plan" / f"step-{number}")
    run = cli("plan", "diff", tmp_path / "c", two_plans[0])
    assert run.code == 2
    assert "2 steps" in run.err and "step-1" in run.err


@pytest.mark.parametrize("place", ["missing", "."])
def test_a_folder_without_a_plan_is_named(cli, tmp_path, place):
    with pytest.raises(PlanError, match=r"no plan|not a folder"):
        find_plans(tmp_path / place)
    run = cli("plan", "show", tmp_path / place)
    assert (run.code, run.out) == (1, "")


def test_apply_refuses_a_plan_for_another_model(cli, two_plans, tiny_checkpoint, tmp_path):
    run = cli("plan", "apply", two_plans[0], tiny_checkpoint, "--out", tmp_path / "out")
    assert run.code == 1
    assert run.err.startswith("error: ") and run.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_apply_checks_the_format_first(cli, two_plans):
    run = cli("plan", "apply", two_plans[0], "m", "--out", "x", "--format", "zip")
    assert run.code == 2 and "dense or packed" in run.err
