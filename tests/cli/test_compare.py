"""``secateur compare``."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest

from secateur import api
from secateur.cli import main

QUICK = ("--samples", 2, "--length", 32, "--windows", 4, "--quiet")
ASKED = ("--methods", "random_sp,wanda_sp,flap:bias=false", "--sparsity", "0.3,0.5", "--seeds", "0,1")
LOOSE = ("--tolerance", 0.03)


def document(folder):
    """``compare.json`` without what tells of time and memory."""
    read = json.loads((folder / "compare.json").read_text(encoding="utf8"))
    for row in read["rows"]:
        for key in ("seconds", "peak_bytes", "shared_statistics", "stages"):
            del row[key]
    return read


def test_a_comparison_says_who_is_best(cli, tiny_checkpoint, tmp_path):
    out = tmp_path / "out"
    run = cli("compare", tiny_checkpoint, *ASKED, *LOOSE, *QUICK, "--out", out)
    assert run.code == 0, run.err
    found = document(out)
    assert found["methods"] == ["random_sp", "wanda_sp", "flap:bias=false"] and found["sparsities"] == [0.3, 0.5]
    for verdict in found["verdicts"]:
        assert verdict["sentence"] in run.out
    (row,) = [line for line in run.out.splitlines() if line.split()[:2] == ["0.5", "random_sp"]]
    assert " 50.0 % " in row
    assert found["tolerance"] == 0.03 and found["windows"] == 4


def test_a_killed_comparison_goes_on_and_ends_the_same(cli, tiny_checkpoint, tmp_path):
    arguments = ["compare", tiny_checkpoint, *ASKED, *QUICK]
    assert cli(*arguments, "--out", tmp_path / "whole").code == 0
    out, stop = tmp_path / "out", time.monotonic() + 60
    journal = out / "journal.jsonl"
    child = os.fork()
    if child == 0:
        # nothing of the test may run on in the child
        try:
            main([str(word) for word in (*arguments, "--out", out)])
        finally:
            os._exit(0)
    while not (journal.is_file() and journal.read_bytes().count(b"\n") >= 4) and time.monotonic() < stop:
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    before = len(journal.read_bytes().splitlines())
    assert not (out / "compare.json").exists()
    resumed = cli(*arguments, "--out", out, "--resume")
    assert resumed.code == 0, resumed.err
    assert document(out) == document(tmp_path / "whole")
    # head, dense model and twelve points, each once
    assert 4 <= before < 14 and len(journal.read_bytes().splitlines()) == 14


def test_heal_is_for_all_alike_and_json_is_all_of_stdout(cli, tiny_checkpoint, tmp_path):
    asked = ("--methods", "magnitude_sp,wanda_sp", "--sparsity", "0.5", "--heal", "refit", "--tasks", "perplexity,size")
    run = cli("compare", tiny_checkpoint, *asked, *QUICK, "--out", tmp_path / "out", "--json")
    assert run.code == 0, run.err
    found = json.loads(run.out)
    assert found["output"] == str(tmp_path / "out") and found["for_all"] == {"heal": "refit"}
    for row in found["rows"]:
        plan = json.loads((tmp_path / "out" / row["plans"][0] / "plan.json").read_text(encoding="utf8"))
        assert plan["provenance"][0]["options"]["heal"] == "refit"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--methods"),
        (["--methods", "flap,osscar"], "--out"),
        (["--methods", "flap,osscar", "--out", "o", "--resume", "--overwrite"], "give one of them"),
        (["--methods", "flap,osscr", "--out", "o"], "did you mean 'osscar'?"),
        (["--methods", "flap,osscar", "--out", "o", "--sparsity", "0.2;0.3"], "--sparsity takes numbers"),
        (["--methods", "flap,osscar", "--out", "o", "--seeds", "0,x"], "--seeds takes whole numbers"),
        (["--methods", "flap,osscar", "--out", "o", "--tasks", "perplxity"], "did you mean 'perplexity'?"),
        (["--methods", "flap,shortgpt", "--out", "o", "--heal", "refit"], "shortgpt takes no heal"),
    ],
)
def test_misuse_is_one_line_and_code_2(cli, arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(api, "load", lambda *a, **k: pytest.fail("a model was loaded"))
    run = cli("compare", "m", *arguments)
    assert run.code == 2 and run.out == "" and run.err.count("\n") == 1, run.err
    assert said in run.err
    assert list(tmp_path.iterdir()) == []
