"""Nothing runs because a file names it: recipes need the flag that remote code needs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from secateur.errors import OutputError, UsageError
from secateur.recipes import load_recipe
from secateur.runs.folder import read_document
from secateur.trainer import load_train_recipe, make_train_recipe

DIGITS = {"images": "sklearn:digits?split=train&limit=40", "test": "sklearn:digits?limit=20"}
EVIL = "from pathlib import Path\nPath('ran').touch()\ndef made(**_):\n    return None\n"
SENTENCE = (
    "{} names code that would be run ({}): pass --trust-remote-code (trust_remote_code=True) if you trust the file"
)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("evil.py").write_text(EVIL)
    return tmp_path


def training(model: object, **more: object) -> dict:
    return {"model": model, "data": DIGITS, "steps": 1, "batch": 4, "out": "out", **more}


REPEATED = {
    "train": {},
    "lottery": {"lottery": {"levels": 1, "at": [1], "method": "lottery_ticket"}},
    "stability": {"stability": {"points": 2}},
}
NAMED = {
    "./evil.py:made": "model: ./evil.py:made",
    "os:system": "model: os:system",
}


@pytest.mark.parametrize("command", REPEATED)
@pytest.mark.parametrize("name", NAMED)
def test_code_that_a_training_names_is_refused(cli, here, command, name):
    options = {"command": "touch ran"} if name == "os:system" else {}
    recipe = training({"name": name, "options": options}, **REPEATED[command])
    Path("evil.yaml").write_text(yaml.safe_dump(recipe))
    run = cli(command, "evil.yaml")
    assert run.code == 2 and run.err.strip() == "error: " + SENTENCE.format("evil.yaml", NAMED[name])
    assert not Path("ran").exists() and not Path("out").exists()


@pytest.mark.parametrize(
    "options", [{"checkpoint_path": "x.pth"}, {"pretrained_cfg_overlay": {"file": "x"}}, {"trust_remote_code": True}]
)
@pytest.mark.parametrize("name", ["timm:resnet18", "some/classifier"])
def test_options_that_lead_to_other_files_are_refused(here, name, options):
    Path("evil.yaml").write_text(yaml.safe_dump(training({"name": name, "options": options})))
    with pytest.raises(UsageError, match=f"names code.*{next(iter(options))}"):
        load_train_recipe("evil.yaml")


def test_a_recipe_cannot_trust_itself(cli, here):
    Path("evil.yaml").write_text(yaml.safe_dump(training({"name": str(here), "options": {"trust_remote_code": True}})))
    run = cli("train", "evil.yaml", "--trust-remote-code")
    assert run.code == 2 and "is no option of a model" in run.err


def test_trusted_and_given_code_runs(here):
    Path("evil.yaml").write_text(yaml.safe_dump(training("./evil.py:made")))
    assert load_train_recipe("evil.yaml", trust_remote_code=True).model.factory == "./evil.py:made"
    assert make_train_recipe(training("./evil.py:made"), "here").model.factory == "./evil.py:made"


def test_a_pruning_recipe_imports_no_model_and_names_no_task_file(cli, here):
    step = {"method": "magnitude", "sparsity": 0.5}
    Path("model.yaml").write_text(yaml.safe_dump({"model": str(here / "evil.py:made"), "steps": [step], "out": "out"}))
    for command in (("prune", "--recipe"), ("estimate", "--recipe")):
        assert cli(*command, "model.yaml").code and not Path("ran").exists()
    task = {"model": "x", "steps": [step], "out": "out", "evaluate": ["size", "lm_eval:evil.yaml?limit=1"]}
    Path("task.yaml").write_text(yaml.safe_dump(task))
    sentence = SENTENCE.format("task.yaml", "lm_eval:evil.yaml?limit=1")
    run = cli("prune", "--recipe", "task.yaml")
    assert run.code == 2 and run.err.strip() == f"error: {sentence}"
    with pytest.raises(UsageError) as caught:
        load_recipe("task.yaml")
    assert str(caught.value) == sentence
    # what the command line says instead is the user's word
    assert "names code" not in cli("prune", "--recipe", "task.yaml", "--evaluate", "size").err
    Path("sweep.yaml").write_text(yaml.safe_dump({**task, "sweep": {"grid": {"sparsity": [0.1, 0.2]}}}))
    run = cli("sweep", "sweep.yaml")
    assert run.code == 2 and "names code" in run.err


@pytest.mark.parametrize("document", ['{"dtype": "ops"}', "[]", '{"dtype": [1]}', "{"])
def test_the_run_that_goes_on_takes_no_name_from_its_file(tmp_path, document):
    (tmp_path / "run.json").write_text(document)
    with pytest.raises(OutputError, match="damaged"):
        read_document(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"dtype": "bfloat16"}))
    assert read_document(tmp_path) == {"dtype": "bfloat16"}
