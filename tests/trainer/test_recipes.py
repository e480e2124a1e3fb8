"""The recipes of the docs are valid as they are, and run with tiny budgets on data that every machine has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from secateur.recipes import read_recipe
from secateur.trainer import make_train_recipe
from secateur.trainer.lottery import make_lottery_recipe
from secateur.trainer.stability import make_stability_recipe

RECIPES = sorted((Path(__file__).parents[2] / "docs" / "recipes").glob("*.yaml"))
MAKE = {"lottery": make_lottery_recipe, "stability": make_stability_recipe}
DIGITS = {"images": "sklearn:digits?split=train", "test": "sklearn:digits?limit=40"}


def tiny(found: dict[str, Any], checkpoint: Path, text: Path) -> dict[str, Any]:
    """The same recipe for a few steps of a small network."""
    small = {key: value for key, value in found.items() if key not in ("epochs", "steps", "measure")}
    small |= {"steps": 4, "batch": 8}
    if "text" in found["data"]:
        small |= {"model": str(checkpoint), "data": {"text": str(text), "length": 16, "windows": 2}}
    else:
        small["data"] = DIGITS | ({"augment": found["data"]["augment"]} if "augment" in found["data"] else {})
    if found["model"] == "resnet20":
        small["model"] = {"name": "resnet20", "options": {"channels": 1, "width": 4, "blocks": 1}}
    if "sparsifier" in found:
        small["sparsifier"] = {key: value for key, value in found["sparsifier"].items() if key != "end"} | {"every": 1}
    if "lottery" in found:
        small["lottery"] = found["lottery"] | {"levels": 1, "seeds": [0], "at": [1]}
    if "stability" in found:
        small["stability"] = {**found["stability"], "at": [0, "50%"], "points": 3, "batches": 2}
    return small


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_runs(path, cli, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = read_recipe(path)
    command = next((key for key in MAKE if key in found), "train")
    assert MAKE.get(command, make_train_recipe)(found, str(path)).out == path.stem
    text = tmp_path / "text.txt"
    text.write_text("it was a text, and it was read. " * 200, encoding="utf8")
    Path("tiny.yaml").write_text(yaml.safe_dump(tiny(found, tiny_checkpoint, text)), encoding="utf8")
    one = ["--workers", 1] if command == "lottery" else []
    run = cli(command, "tiny.yaml", "--json", "--quiet", *one)
    assert run.code == 0, run.err
    document = json.loads(run.out)
    assert document["output"] == path.stem and Path(path.stem).is_dir()
    if command == "train":
        assert document["achieved"] == pytest.approx(found["sparsifier"]["sparsity"], abs=0.01)
    elif command == "stability":
        assert [one["step"] for one in document["steps"]] == [0, 2] and document["metric"] == "accuracy"
    else:
        controls = found["lottery"]["controls"]
        assert [t["branch"] for t in document["trainings"]] == ["ticket", "ticket", *controls]


def test_there_are_recipes_of_every_kind():
    assert len(RECIPES) == 7
