"""``best`` stands for a method with its allocator, and for nothing else."""

import math

import pytest
import torch
from typer.testing import CliRunner

import secateur as sc
from families import make_tiny
from secateur.cli.app import app
from secateur.errors import OptionError, UsageError
from secateur.methods import list_methods, make_method, settled
from secateur.methods.presets import Preset
from secateur.recipes import make_recipe

EFFORTS = ("seconds", "minutes", "hour")


@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize("asked", [{}, {"pattern": "2:4"}, {"cut": "heads_and_neurons"}, {"budget": "params"}])
def test_every_effort_stands_for_a_method_with_what_was_asked(effort, asked):
    method, allocate = settled(make_method("best", {"sparsity": 0.4, "effort": effort, **asked}), None)
    assert not isinstance(method, Preset) and method.name in list_methods()
    assert method.options()["sparsity"] == 0.4 and method.options().get("pattern", "") == asked.get("pattern", "")
    units = "cut" in asked or "budget" in asked
    assert method.descriptor.object == ("heads_and_neurons" if units else "weights")
    # at little sparsity unequal ones cost, and N:M fixes where the weights leave
    assert allocate is None


def test_early_blocks_stay_denser_where_most_weights_leave():
    method, allocate = settled(make_method("best", {"sparsity": 0.7}), None)
    assert (method.name, allocate) == ("alps", "progression")
    assert settled(make_method("best", {"sparsity": 0.7}), "owl:m=5")[1] == "owl:m=5"
    assert settled(make_method("best", {"sparsity": 0.6}), None)[1] is None


def test_what_has_seconds_is_fitted_anew():
    for asked in ({}, {"sparsity": 0.7}, {"pattern": "2:4"}):
        method, allocate = settled(make_method("best", {"effort": "seconds", **asked}), None)
        assert (method.name, method.options()["heal"], allocate) == ("wanda", "refit", None)


@pytest.mark.parametrize(
    ("asked", "quick", "slow"),
    [
        ({"cut": "heads_and_neurons"}, "cfsp", "cfsp"),
        ({"budget": "macs", "sparsity": 0.4}, "cfsp", "cfsp"),
        ({"budget": "params=0.7"}, "cfsp", "cfsp"),
        ({"budget": "params=0.4"}, "flap", "osscar"),
        ({"budget": "params=0.7,macs=0.8"}, "flap", "osscar"),
        ({"budget": "params", "sparsity": 0.6}, "flap", "osscar"),
        ({"budget": "kv_bytes", "sparsity": 0.2}, "flap", "osscar"),
        ({"budget": "latency=0.8"}, "flap", "osscar"),
        ({"budget": "neurons", "sparsity": 0.6}, "cfsp", "cfsp"),
        ({"budget": "neurons=0.3,kv_bytes=1"}, "cfsp", "cfsp"),
    ],
)
def test_neurons_leave_alone_as_long_as_there_are_enough_of_them(asked, quick, slow):
    asked = {"sparsity": 0.2, **asked}
    for effort, name in (("seconds", quick), ("minutes", slow)):
        method, _ = settled(make_method("best", {"effort": effort, **asked}), None)
        assert method.name == name
        assert method.options()["heal"] == ("refit" if effort == "minutes" else "none")


def test_what_may_stay_of_one_thing_is_what_a_sparsity_says():
    left, gone = ({"budget": "macs=0.7"}, {"budget": "macs", "sparsity": 0.3})
    options = [settled(make_method("best", asked), None)[0].options() for asked in (left, gone)]
    assert options[0] == options[1]


def test_stages_choose_once_by_what_they_remove_together():
    for budget, name in (("params=0.4", "osscar"), ("params=0.7", "cfsp")):
        recipe = make_recipe({"steps": [{"method": "best", "budget": budget, "stages": 3}]}, "test")
        whole, _ = settled(make_method("best", {"budget": budget}), None)
        methods = [recipe.words(step)[0] for step in recipe.steps]
        assert [method.name for method in methods] == [name] * 3
        assert math.prod(1 - method.sparsity for method in methods) == pytest.approx(1 - whole.sparsity)
        for method in methods:
            assert method.options() == {**whole.options(), "sparsity": method.sparsity}


def test_the_plan_is_that_of_what_it_stands_for(make_llama, tiny_tokenizer, tmp_path):
    model, text = make_llama(), tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog " * 40)
    how = {"sparsity": 0.5, "calibration": text, "samples": 4, "length": 16, "dtype": "float32"}
    best = sc.plan(model, tiny_tokenizer, method="best", **how)
    chosen, allocate = settled(make_method("best", {"sparsity": 0.5}), None)
    assert best.provenance[0].method == chosen.name and best.provenance[0].options == chosen.options()
    more = {name: value for name, value in chosen.options().items() if name not in ("sparsity", "pattern")}
    same = sc.plan(model, tiny_tokenizer, method=chosen.name, allocate=allocate, options=more, **how)
    assert best.provenance == same.provenance and all(torch.equal(best.masks[n], same.masks[n]) for n in same.masks)
    own = sc.plan(model, tiny_tokenizer, method="best", allocate="erk", options={"effort": "seconds"}, **how)
    assert own.provenance[0].allocation.allocator == "erk"


@pytest.mark.parametrize(
    ("asked", "chosen"),
    [
        ({}, "stream"),
        ({"pattern": "2:4"}, "stream"),
        ({"budget": "params"}, "current"),
        ({"budget": "params", "sparsity": 0.3}, "stream"),
        ({"effort": "seconds"}, "current"),
    ],
)
def test_the_target_is_what_measured_best_or_what_is_asked_for(asked, chosen):
    assert settled(make_method("best", asked), None)[0].target == chosen
    for target in ("current", "stream"):
        assert settled(make_method("best", {**asked, "target": target}), None)[0].target == target
    with pytest.raises(OptionError, match="target must be one of auto, current, stream"):
        make_method("best", {**asked, "target": "dense"})


def test_matrices_of_a_block_see_each_other_where_there_are_minutes():
    for asked in ({}, {"pattern": "2:4"}, {"sparsity": 0.7}):
        assert settled(make_method("best", asked), None)[0].options()["true_sequential"]
        assert not settled(make_method("best", {**asked, "effort": "seconds"}), None)[0].options()["true_sequential"]


def test_what_does_not_go_together():
    with pytest.raises(OptionError, match="pattern 2:4 is for single weights, not for heads and neurons"):
        settled(make_method("best", {"pattern": "2:4", "budget": "latency=0.7"}), None)
    with pytest.raises(OptionError, match="single weights meet no budget of kv_bytes"):
        settled(make_method("best", {"cut": "weights", "budget": "kv_bytes"}), None)
    with pytest.raises(OptionError, match="best takes no heal"):
        sc.plan(make_tiny("llama"), method="best", heal="refit")
    with pytest.raises(UsageError, match="best"):
        sc.plan(torch.nn.Linear(4, 4), method="best", example_inputs=(torch.zeros(1, 4),))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--effort", "days"], "best: effort must be one of seconds, minutes, hour"),
        (["--effort", "hour", "--set", "effort=hour"], "--effort and --set effort say the same"),
        (["--method", "wanda", "--effort", "hour"], "wanda has no option 'effort'"),
    ],
)
def test_effort_on_the_command_line(more, said, tmp_path):
    result = CliRunner().invoke(
        app, ["prune", "smollm2-135m", "--method", "best", "--out", str(tmp_path / "out"), *more]
    )
    assert result.exit_code and said in result.output + str(result.exception)
