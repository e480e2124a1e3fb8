"""``secateur sweep``."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import signal
import sys
import time

import pytest

from forking import Forked
from secateur import api
from secateur.sweep import worker

RECIPE = """
model: {model}
calibration: {{samples: 2, length: 32}}
windows: 2
sweep: {{grid: {{method: [magnitude, flap], sparsity: [0.3, 0.5]}}}}
"""


@pytest.fixture
def recipe(tmp_path, tiny_checkpoint):
    path = tmp_path / "sweep.yaml"
    path.write_text(RECIPE.format(model=tiny_checkpoint), encoding="utf8")
    return path


def test_a_sweep_leaves_table_csv_json_page_and_plans(cli, recipe, tmp_path):
    out = tmp_path / "out"
    run = cli("sweep", recipe, "--workers", 1, "--out", out)
    assert run.code == 0, run.err
    rows = [line.split() for line in run.out.splitlines()]
    assert ["method", "sparsity", "removed", "perplexity", "on", "disk", "nonzero"] in rows
    assert [row[:2] for row in rows if row[:1] in (["magnitude"], ["flap"])] == [
        [method, sparsity] for method in ("magnitude", "flap") for sparsity in ("0.3", "0.5")
    ]
    assert "sweep 4/4" in run.err
    document = json.loads((out / "results.json").read_text())
    with (out / "results.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["point"] for line in lines] == ["dense", *(point["point"] for point in document["points"])]
    for line, point in zip(lines[1:], document["points"], strict=True):
        assert float(line["perplexity:builtin"]) == point["metrics"]["perplexity:builtin"]
        assert float(line["sparsity"]) == point["values"]["sparsity"]
        assert (out / point["plan"] / "plan.json").is_file()
    assert document["pareto"]["parameters"]["quality"] == "perplexity:builtin"
    assert (out / "sweep.html").is_file()
    # a plan of a sweep is a plan like any other
    shown = cli("plan", "show", out / document["points"][0]["plan"])
    assert shown.code == 0 and "magnitude" in shown.out


def test_json_is_the_only_thing_on_stdout(cli, recipe, tmp_path):
    run = cli("sweep", recipe, "--workers", 1, "--out", tmp_path / "out", "--json", "--quiet")
    document = json.loads(run.out)
    assert run.err == "" and len(document["points"]) == 4
    saved = json.loads((tmp_path / "out" / "results.json").read_text())
    assert document == {"output": str(tmp_path / "out"), **saved}


def test_a_folder_in_the_recipe_is_enough_and_resume_does_nothing_twice(cli, recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe.write_text(recipe.read_text() + "out: here\n")
    assert cli("sweep", recipe, "--workers", 1).code == 0
    again = cli("sweep", recipe, "--workers", 1)
    assert again.code == 1 and "here holds a sweep: pass --resume" in again.err
    monkeypatch.setattr(worker.Worker, "run", lambda self, point: pytest.fail("a point was run again"))
    done = cli("sweep", recipe, "--workers", 1, "--resume", "--json")
    assert done.code == 0 and json.loads(done.out)["reused"] == 4


def test_without_ray_the_points_run_in_sequence_with_a_note(cli, recipe, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "ray" else find(name, *a))
    run = cli("sweep", recipe, "--out", tmp_path / "out", "--json")
    assert run.code == 0, run.err
    assert "note: Ray is not installed, so the points ran in sequence: pip install 'secateur[sweep]'" in run.err
    assert {point["worker"] for point in json.loads(run.out)["points"]} == {os.getpid()}


def test_failed_points_are_shown_and_the_exit_code_says_so(cli, recipe, tmp_path):
    recipe.write_text(
        recipe.read_text().replace(
            "method: [magnitude, flap], sparsity: [0.3, 0.5]", "method: wanda, pattern: [2:4, 2:7]"
        )
    )
    run = cli("sweep", recipe, "--workers", 1, "--out", tmp_path / "out")
    assert run.code == 1
    assert "error: 1 of 2 points failed, the first of them wanda-pattern=2_7: " in run.err and "--resume" in run.err
    assert any(line.split()[:2] == ["2:7", "failed"] for line in run.out.splitlines())
    assert json.loads((tmp_path / "out" / "results.json").read_text())["failed"] == ["wanda-pattern=2_7"]
    assert "wanda-pattern=2_7" in (tmp_path / "out" / "sweep.html").read_text()


@pytest.mark.parametrize(
    ("change", "arguments", "said"),
    [
        (("flap]", "flpa]"), ["--out", "out"], "did you mean 'flap'?"),
        (("sparsity", "sparsty"), ["--out", "out"], "did you mean 'sparsity'?"),
        (("windows: 2", "evaluate: [perplxity]"), ["--out", "out"], "did you mean 'perplexity'?"),
        (("", ""), [], "--out"),
        (("", ""), ["--out", "out", "--resume", "--overwrite"], "give one of them"),
        (("", ""), ["--out", "out", "--workers", "0"], "--workers"),
    ],
)
def test_misuse_is_one_line_and_nothing_is_written(cli, recipe, tmp_path, monkeypatch, change, arguments, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(api, "load", lambda *a, **k: pytest.fail("a model was loaded"))
    recipe.write_text(recipe.read_text().replace(*change))
    run = cli("sweep", recipe, *arguments)
    assert (run.code, run.out) == (2, "")
    assert run.err.startswith("error: ") and run.err.count("\n") == 1 and said in run.err
    assert not (tmp_path / "out").exists()


def test_a_search_without_optuna_says_how_to_get_it(cli, recipe, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    recipe.write_text(recipe.read_text().replace("grid", "search"))
    run = cli("sweep", recipe, "--out", tmp_path / "out")
    assert run.code == 1 and "pip install 'secateur[sweep]'" in run.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupted_sweep_says_how_to_go_on(recipe, tmp_path, workers):
    if workers > 1:
        pytest.importorskip("ray")
    out = tmp_path / "out"
    # magnitude and flap at many sparsities: long enough to be interrupted
    grid = ", ".join(f"0.{number:03d}" for number in range(100, 400))
    recipe.write_text(recipe.read_text().replace("0.3, 0.5", grid))
    journal, stop = out / "journal.jsonl", time.monotonic() + 300
    with Forked(["sweep", recipe, "--workers", workers, "--out", out]) as process:
        while not (journal.exists() and len(journal.read_text().splitlines()) > 3) and time.monotonic() < stop:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        err = process.stderr.read()
        assert process.wait() == 130
    done = len(journal.read_text().splitlines()) - 2
    assert f"interrupted; {done} of 600 points are done: --resume goes on with the rest" in err
    assert "Traceback" not in err
