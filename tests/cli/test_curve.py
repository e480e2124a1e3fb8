"""``secateur curve``."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import time
from pathlib import Path

import pytest

from secateur.cli import main
from secateur.cli.curve import parse_sparsities
from secateur.errors import UsageError
from secateur.sweep import worker
from secateur.sweep.records import Record

QUICK = ("--samples", 2, "--length", 32, "--windows", 2, "--quiet")
WANDA = ("--method", "wanda", "--allocate", "progression", "--sparsities", "0.2:0.8", "--points", 3)


def document(folder: Path) -> dict:
    """``curve.json`` without what tells of time."""
    read = json.loads((folder / "curve.json").read_text(encoding="utf8"))
    return {key: value for key, value in read.items() if key != "seconds"}


def test_a_curve_leaves_json_page_and_plans(cli, tiny_checkpoint, tmp_path):
    out = tmp_path / "out"
    run = cli("curve", tiny_checkpoint, *WANDA, *QUICK, "--out", out)
    assert run.code == 0, run.err
    found = document(out)
    assert found["method"] == "wanda" and found["allocate"] == "progression"
    (curve,) = found["curves"]
    ran = [point["sparsity"] for point in curve["points"]]
    assert ran[0] == 0 and {0.2, 0.5, 0.8} <= set(ran)
    # what is recommended was run, and what was expected of it is said beside
    recommended = found["recommended"]
    assert recommended["sparsity"] in ran
    assert recommended["measured"] == dict(map(dict.values, curve["points"]))[recommended["sparsity"]]
    assert f"sparsity {recommended['sparsity']:g} is recommended" in run.out and "knee" in run.out
    for sparsity in ran[1:]:
        assert (out / "plans" / f"sparsity={sparsity}" / "plan.json").is_file()
    pytest.importorskip("plotly")
    page = (out / "curve.html").read_text(encoding="utf8")
    assert "The knee is where the curve lies furthest below" in page
    charts = json.loads(re.search(r'id="charts">(.*?)</script>', page, re.S)[1])
    line, marks, knee = charts["chart-1"]["data"]
    assert marks["x"] == ran and knee["x"] == [curve["knee"]] and len(line["x"]) > len(ran)


def test_points_that_failed_are_in_the_exit_code(cli, tiny_checkpoint, tmp_path):
    asked = ("--method", "magnitude_sp", "--sparsities", "0.2,0.4,0.99")
    run = cli("curve", tiny_checkpoint, *asked, *QUICK, "--out", tmp_path / "out")
    assert run.code == 1 and "1 of 3 points failed, the first of them sparsity=0.99: can't remove 99.0%" in run.err
    assert list(document(tmp_path / "out")["failed"]) == ["sparsity=0.99"] and "is recommended" in run.out


def test_a_second_task_without_a_curve_costs_the_first_nothing(cli, tiny_checkpoint, tmp_path, monkeypatch):
    (tmp_path / "other.txt").write_text("a text of its own " * 50)
    metric = Record.metric
    monkeypatch.setattr(
        Record, "metric", lambda self, name: math.inf if "other" in name and self.values else metric(self, name)
    )
    tasks = ("--evaluate", "perplexity:builtin", "--evaluate", f"perplexity:{tmp_path / 'other.txt'}")
    quick = [argument for argument in QUICK if argument != "--quiet"]
    run = cli("curve", tiny_checkpoint, *WANDA, *quick, *tasks, "--out", tmp_path / "out")
    assert run.code == 0 and len(document(tmp_path / "out")["curves"]) == 1, run.err
    assert re.search(r"no curve of \S*other\S*: a curve needs two sparsities", " ".join(run.err.split()))


def test_a_killed_curve_goes_on_and_ends_the_same(cli, tiny_checkpoint, tmp_path, monkeypatch):
    arguments = ["curve", str(tiny_checkpoint), *map(str, WANDA), *map(str, QUICK)]
    assert cli(*arguments, "--out", tmp_path / "whole").code == 0
    out = tmp_path / "out"
    child = os.fork()
    if child == 0:
        # nothing of the test may run on in the child
        try:
            main([*arguments, "--out", str(out)])
        finally:
            os._exit(0)
    # two lines and the head: the dense model and a point are done
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if (out / "journal.jsonl").is_file() and (out / "journal.jsonl").read_bytes().count(b"\n") >= 3:
            break
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    measured = []
    run = worker.Worker.run
    monkeypatch.setattr(worker.Worker, "run", lambda self, point: measured.append(point) or run(self, point))
    resumed = cli(*arguments, "--out", out, "--resume")
    assert resumed.code == 0, resumed.err
    assert document(out) == document(tmp_path / "whole")
    # what was done before is not done again
    assert None not in measured and len(measured) <= 3


def test_a_factor_is_kept_within(cli, tiny_checkpoint, tmp_path):
    out = tmp_path / "out"
    asked = ("--method", "magnitude", "--sparsities", "0.1,0.5,0.9", "--within", 1.05)
    run = cli("curve", tiny_checkpoint, *asked, *QUICK, "--out", out, "--json")
    found = json.loads(run.out)
    (curve,) = found["curves"]
    dense, chosen = curve["points"][0]["value"], found["recommended"]["sparsity"]
    inside = [point["sparsity"] for point in curve["predicted"] if point["value"] <= 1.05 * dense]
    assert chosen <= max(inside) + 0.05 and found["output"] == str(out)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--method"),
        (["--method", "wanda"], "--out"),
        (["--method", "wanda", "--out", "o", "--sparsities", "0.8:0.1:2"], "LOW:HIGH or S,S"),
        (["--method", "wanda", "--out", "o", "--sparsities", "0:0.5"], "in (0, 1)"),
        (["--method", "wanda", "--out", "o", "--within", 0.9], "--within is a factor above 1"),
        (["--method", "wanda", "--out", "o", "--resume", "--overwrite"], "give one of them"),
        (["--method", "flap", "--out", "o", "--allocate", "owl"], "flap removes heads and neurons"),
        (["--method", "wnda", "--out", "o"], "did you mean 'wanda'?"),
        (["--method", "wanda", "--out", "o", "--evaluate", "perplxity"], "did you mean 'perplexity'?"),
    ],
)
def test_misuse_is_one_line_and_code_2(cli, arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = cli("curve", "m", *arguments)
    assert run.code == 2 and run.out == "" and run.err.count("\n") == 1
    assert said in run.err
    assert list(tmp_path.iterdir()) == []


def test_a_budget_is_a_curve_too(cli, tiny_checkpoint, tmp_path):
    out = tmp_path / "out"
    asked = ["--method", "magnitude_sp", "--budget", "params", "--sparsities", "0.2,0.4"]
    run = cli("curve", tiny_checkpoint, *asked, *QUICK, "--out", out)
    assert run.code == 0, run.err
    assert {0.2, 0.4} <= {point["sparsity"] for point in document(out)["curves"][0]["points"]}


def test_ranges_and_lists():
    assert parse_sparsities("0.1:0.7", 4) == [0.1, 0.3, 0.5, 0.7]
    assert parse_sparsities("0.5, 0.3", 4) == [0.3, 0.5]
    with pytest.raises(UsageError):
        parse_sparsities("0.5", 4)
