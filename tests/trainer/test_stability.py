"""``secateur stability`` of a recipe: copies that begin where a lottery goes back to, and what decides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import secateur as sc
from secateur.errors import CorruptFileError
from secateur.rounds import Run
from secateur.rounds.levels import load_masks
from secateur.rounds.run import trained
from secateur.rounds.stability import _made, _orders
from secateur.rounds.stabilitypage import Limit
from secateur.tensorfiles import tensors_of
from secateur.trainer import stability
from secateur.trainer.examples import load_examples
from secateur.trainer.lottery import LotteryWorker, Trial, make_job, make_lottery_recipe
from secateur.trainer.networks import first_network, perceptron
from secateur.trainer.stability import StabilityRecipe, load_stability_recipe, run_stability
from secateur.trainer.training import train

RECIPE: dict[str, Any] = {
    "model": {"name": "perceptron", "options": {"sizes": [64, 16, 10]}},
    "data": {"images": "sklearn:digits?split=train", "test": "sklearn:digits?limit=60"},
    "steps": 6,
    "batch": 16,
    "stability": {"at": [0, "50%"], "points": 3},
}
NORMS = """
from torch import nn


def net():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10))
"""


@pytest.fixture
def recipe(tmp_path):
    def made(changed: dict[str, Any] | None = None, **changes: Any) -> StabilityRecipe:
        path = tmp_path / "stability.yaml"
        path.write_text(yaml.safe_dump({**RECIPE, **changes}), encoding="utf8")
        # some of these name code that a test has written
        return load_stability_recipe(path, changed or {}, trust_remote_code=True)

    return made


@pytest.fixture(scope="module")
def lottery(tmp_path_factory) -> Path:
    """The seed 3 of a lottery whose weights go back to step 3, with one level."""
    folder = tmp_path_factory.mktemp("lottery")
    spec = {"method": "lottery_rewind", "start_at": "50%", "levels": 1, "seeds": [3], "rate": 0.5}
    asked = {**{k: v for k, v in RECIPE.items() if k != "stability"}, "lottery": spec}
    job = make_job(make_lottery_recipe(asked, "the recipe"), folder, plugins=(), trust_remote_code=False)
    LotteryWorker(job).run(Trial(3, 1))
    return folder / "seed-3"


def test_copies_begin_where_a_lottery_goes_back_to(recipe, lottery, monkeypatch):
    begun: list[tuple[int, int | None, dict[str, torch.Tensor]]] = []

    def spy(network: Any, examples: Any, asked: Any, *, first: int, last: int | None, seed: int) -> Any:
        begun.append((first, last, {n: t.clone() for n, t in tensors_of(network).items()}))
        return train(network, examples, asked, first=first, last=last, seed=seed)

    monkeypatch.setattr(stability, "train", spy)
    level = lottery / "level-01"
    found = run_stability(recipe({"at": ["50%"], "masks": str(level)}, seed=3))
    (start, *copies), there = begun, load_file(lottery / "start.safetensors")
    masks = load_masks(level, perceptron([64, 16, 10]))
    assert start[:2] == (0, 3) and [copy[:2] for copy in copies] == [(3, 6), (3, 6)]
    assert sum(int(mask.sum()) for mask in masks.values()) == (64 * 16 + 16 * 10) // 2
    for _, _, tensors in copies:
        assert all(torch.equal(t, there[n] * masks[n] if n in masks else there[n]) for n, t in tensors.items())
    assert found[3].l2 > 0 and found.protocol["live"] == {n: int(mask.sum()) for n, mask in masks.items()}


def test_ends_of_the_line_are_trainings_in_their_own_order(recipe):
    asked = recipe({"at": [0]}, seed=1)
    [one] = run_stability(asked).found
    accuracy = one.curves["accuracy"]
    assert accuracy.higher_is_better and len(accuracy.values) == 3 and not one.curves["loss"].higher_is_better
    assert one.l2 > 0 and run_stability(asked)[0] == one
    # a copy is a plain training of the recipe, from the same first weights and in the order of its seed
    examples = load_examples(asked, None, None)

    def alone(network: Any, run: Run) -> None:
        train(network, examples, asked, seed=run.seed)

    ends = []
    for order in _orders(1, 0):
        module = _made(first_network(asked, None), 1)
        trained(module, alone, Run(order))
        ends.append(examples.measure(module)["loss"])
    assert [one.curves["loss"].values[-1], one.curves["loss"].values[0]] == ends


def test_at_the_end_of_the_training_there_is_nothing_between(recipe):
    [one] = run_stability(recipe({"at": "100%"})).found
    assert (one.step, one.l2, one.barriers["loss"]) == (6, 0.0, 0.0)


def test_statistics_are_those_of_the_training(recipe, tmp_path):
    (tmp_path / "net_with_norms.py").write_text(NORMS, encoding="utf8")
    model = {"name": f"{tmp_path / 'net_with_norms.py'}:net"}
    again = run_stability(recipe({"at": [0], "batches": 4}, model=model))[0]
    between = run_stability(recipe({"at": [0], "statistics": "interpolate"}, model=model))[0]
    assert again.curves["loss"].values != between.curves["loss"].values and again.l2 == between.l2


def test_text_is_measured_by_what_is_said(tiny_checkpoint, tmp_path, recipe):
    text = tmp_path / "text.txt"
    text.write_text("a text that says little and says it again. " * 100, encoding="utf8")
    data = {"text": str(text), "length": 16, "windows": 2}
    changes = {"model": str(tiny_checkpoint), "data": data, "steps": 3, "batch": 2}
    asked = recipe({"at": [0], "metric": "loss", "within": 0.1}, **changes)
    found = run_stability(asked)
    assert asked.limit == Limit("loss", 0.1) and set(found[0].curves) == {"loss", "perplexity"}
    # pretrained copies begin as one
    assert abs(found[0].barriers["loss"]) < 0.1 and found[0].l2 > 0
    with pytest.raises(sc.SecateurError, match="how much higher the perplexity between copies may be"):
        recipe({"at": [0]}, **changes)


@pytest.mark.parametrize(
    ("changed", "changes", "said"),
    [
        ({"at": ["soon"]}, {}, r"stability.at must be a step \(500\) or a part of the training \(3%\), got 'soon'"),
        ({"at": [7]}, {}, "stability.at is step 7, but a training has the steps 0 to 6"),
        ({"point": 3}, {}, "unknown key 'point' in stability; did you mean 'points'?"),
        ({"points": 1}, {}, "stability.points: .*greater than or equal to 2"),
        ({"statistics": "guess"}, {}, "stability.statistics: .*'recompute' or 'interpolate'"),
        ({"metric": "perplexity", "within": 1}, {}, "stability.metric is one of accuracy, loss"),
        ({"metric": "loss"}, {}, "say with stability.within how much higher the loss"),
        ({}, {"sparsifier": "gmp"}, r"copies hold the masks of a plan .*: leave the sparsifier out"),
        ({}, {"track": ["wandb"]}, "track and format are for a single training"),
        ({}, {"lottery": {"levels": 2}}, "asks for lottery tickets: run it with 'secateur lottery', or leave the key"),
        ({}, {"stability": 3}, "stability: "),
    ],
)
def test_bad_recipes_are_one_sentence(recipe, changed, changes, said):
    with pytest.raises(sc.SecateurError, match=said) as caught:
        recipe(changed, **changes)
    assert "\n" not in str(caught.value)


def test_masks_of_something_else(recipe, lottery, tmp_path):
    other = {"name": "perceptron", "options": {"sizes": [64, 8, 10]}}
    with pytest.raises(CorruptFileError, match="doesn't hold the masks of this network"):
        run_stability(recipe({"masks": str(lottery / "level-01")}, model=other))
    with pytest.raises(sc.SecateurError, match="nowhere"):
        run_stability(recipe({"masks": str(tmp_path / "nowhere")}))


def test_the_command(cli, tmp_path, monkeypatch, lottery):
    monkeypatch.chdir(tmp_path)
    Path("net.yaml").write_text(yaml.safe_dump(RECIPE), encoding="utf8")
    run = cli("stability", "net.yaml", "--out", "stable", "--within", 0.5)
    assert run.code == 0, run.err
    assert "accuracy of both" in run.out and "stable from step 0 on" in run.out and "50.0 % worse" in run.out
    told = json.loads(Path("stable/results.json").read_text(encoding="utf8"))
    assert [one["step"] for one in told["steps"]] == [0, 3] and told["metric"] == "accuracy"
    assert told["protocol"]["recipe"]["model"]["name"] == "perceptron"
    page = Path("stable/stability.html").read_text(encoding="utf8")
    assert "on the line between two copies" in page and "recipe.data.images" in page
    # options take the place of keys, and steps that are done are read
    again = cli("stability", "net.yaml", "--out", "stable", "--resume", "--at", "1,50%", "--json")
    steps = json.loads(again.out)["steps"]
    assert [one["step"] for one in steps] == [1, 3] and steps[1] == told["steps"][1]
    masked = cli("stability", "net.yaml", "--masks", lottery / "level-01", "--at", 0, "--json", "--quiet")
    assert sum(json.loads(masked.out)["protocol"]["live"].values()) == 592
    # a recipe of a training will do
    Path("train.yaml").write_text(
        yaml.safe_dump({k: v for k, v in RECIPE.items() if k != "stability"}), encoding="utf8"
    )
    assert cli("stability", "train.yaml", "--points", 2, "--quiet").code == 0
    for words, said in (
        (("net.yaml", "--out", "stable"), "stable exists"),
        (("net.yaml", "--out", "stable", "--resume", "--seed", 4), "was begun with another seed"),
        (
            ("train.yaml", "--out", "stable", "--resume", "--points", 3, "--at", "99%", "--train", "f.py:f"),
            "the recipe",
        ),
        (("net.py:net",), "net.py:net is no recipe (.yaml), and a function that makes a network needs --train"),
        (("n.py:n", "--train", "n.py:t", "--evaluate", "n.py:e", "--device", "cpu"), "--device is for recipes"),
    ):
        refused = cli("stability", *words)
        assert refused.code and said in " ".join(refused.err.split()), refused.err
    Path("other.yaml").write_text(yaml.safe_dump({**RECIPE, "batch": 8}), encoding="utf8")
    other = cli("stability", "other.yaml", "--out", "stable", "--resume")
    assert other.code and "was begun with another recipe" in other.err
    alone = cli("train", "net.yaml", "--out", "trained")
    assert alone.code == 2 and "run it with 'secateur stability'" in alone.err
