"""Trainings whose channels leave: the network that is written is cut, and is the one with zeros."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_model
from torch import nn

import secateur as sc
from secateur.errors import UnsupportedModelError
from secateur.trainer import cutting, make_train_recipe, run, run_training
from secateur.trainer.examples import load_examples

RECIPE: dict[str, Any] = {
    "model": {"name": "perceptron", "options": {"sizes": [64, 24, 16, 10]}},
    "data": {"images": "sklearn:digits?split=train", "test": "sklearn:digits?limit=100"},
    "steps": 8,
    "batch": 16,
    "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9},
}
CHANNELS = {"method": "gmp", "units": "channels", "sparsity": 0.5, "every": 2}


def recipe(sparsifier: dict[str, Any], **changes: Any) -> Any:
    return make_train_recipe({**RECIPE, "sparsifier": sparsifier, **changes}, "the recipe")


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_the_written_network_is_cut_and_is_the_one_with_zeros(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run_training(recipe(CHANNELS), out="cut", html=True)
    masked = run_training(recipe({**CHANNELS, "cut": False}), out="masked")
    x = torch.rand(5, 1, 8, 8)
    small, large = done.network.module, masked.network.module
    assert done.trained.curve.losses == masked.trained.curve.losses
    assert torch.allclose(small(x), large(x), atol=1e-5) and parameters(small) < 0.6 * parameters(large)
    plan = sc.Plan.load("cut/plan")
    assert sum(map(len, plan.keep.values())) == round(0.5 * sum(plan.groups.values())) and not plan.masks
    # the lines of the README load them
    for one in (done, masked):
        names: dict[str, Any] = {}
        exec(one.report.loading, names)
        assert torch.equal(names["module"].eval()(x), one.network.module(x))
    report = json.loads(Path("cut/report.json").read_text(encoding="utf8"))
    metrics = {metric["name"]: metric["values"] for metric in report["metrics"]}
    assert metrics["parameters"] == {"start": parameters(large), "trained": parameters(small)}
    assert metrics["operations of inference"]["trained"] < metrics["operations of inference"]["start"]
    assert report["requested"] == "a sparsity of 50.0% of the channels" and report["achieved"] == 0.5
    assert "its outputs on what it was measured on are those with zeros" in report["notes"][0]
    assert "operations of inference" not in {metric.name for metric in masked.report.metrics}


def test_what_disagrees_is_written_with_its_zeros_and_said(tmp_path, monkeypatch):
    monkeypatch.setattr(cutting, "difference", lambda *_: 0.1)
    with pytest.raises(UnsupportedModelError, match=r"holds the network with its zeros, and not cut: .* 0\.1 of"):
        run_training(recipe(CHANNELS), out=tmp_path / "out")
    module = run.open_network(recipe(CHANNELS)).module
    load_model(module, tmp_path / "out" / "model.safetensors")
    plan = sc.Plan.load(tmp_path / "out" / "plan")
    # the plan that disagreed is there: rows of channels that left are zero
    assert (module[1].weight.abs().sum(1) > 0).nonzero()[:, 0].tolist() == plan.keep["1"].tolist()
    assert not (tmp_path / "out.run").exists()


def test_a_difference_is_seen():
    asked = recipe(CHANNELS)
    network = run.open_network(asked)
    other = run.open_network(asked).module
    examples = load_examples(asked, network.module, None)
    assert cutting.difference(network.module, other, examples) == 0
    with torch.no_grad():
        other[-1].bias[0] += 0.01
    with torch.no_grad():
        spread = examples.outputs(network.module.eval()).std()
    assert cutting.difference(network.module, other, examples) == pytest.approx(0.01 / float(spread), rel=0.01)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sparsifier": {"method": "gmp", "sparsity": 0.5, "cut": True}}, "cut is for units: channels"),
        ({"sparsifier": {**CHANNELS, "method": "rigl"}}, "rigl with these options prunes single weights"),
        ({"sparsifier": {**CHANNELS, "include": ["0.weight"]}}, "leave out include"),
        ({"sparsifier": {**CHANNELS, "units": "filters"}}, "sparsifier.units: .*'weights' or 'channels'"),
        ({"data": {"text": "builtin"}, "model": "smollm2-135m"}, "channels are those of networks for images"),
    ],
)
def test_what_can_not_be_cut_is_one_sentence(changes, said):
    with pytest.raises(sc.SecateurError, match=said) as caught:
        make_train_recipe({**RECIPE, "sparsifier": CHANNELS, **changes}, "the recipe")
    assert "\n" not in str(caught.value)
