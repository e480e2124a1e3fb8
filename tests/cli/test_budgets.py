"""Budgets on the command line, with a table of latencies that counts operations instead of taking time."""

from __future__ import annotations

import json

import pytest
from torch.utils.flop_counter import FlopCounterMode

from secateur import timing

WORKLOAD = "batch=1,prompt=8,new=2"
CALIBRATION = ("--samples", 2, "--length", 16, "--set", f"workload={WORKLOAD}", "--set", "variant_tokens=16")


@pytest.fixture
def counted(monkeypatch):
    """Time is the number of floating-point operations."""

    def take_turns(works, repeats, devices, step=None):
        found = {}
        for name, work in works.items():
            with FlopCounterMode(display=False) as counter:
                work()
            found[name] = [1e-6 * counter.get_total_flops()] * repeats
        return found

    monkeypatch.setattr(timing, "take_turns", take_turns)


@pytest.fixture
def table(cli, counted, tiny_checkpoint, tmp_path):
    path = tmp_path / "latency.csv"
    run = cli("latency-table", tiny_checkpoint, "--workload", WORKLOAD, "--out", path, "--json")
    assert run.code == 0, run.err
    document = json.loads(run.out)
    assert set(document["block_ms"]) == {"kv_head", "neuron"} and document["dense_ms"] > 0
    return path


def test_two_budgets_from_the_table_to_the_report(cli, table, tiny_checkpoint, tmp_path):
    before = table.read_bytes()
    run = cli(
        "prune", tiny_checkpoint, "--method", "flap", "--budget", "latency=0.8", "--budget", "kv_bytes=0.5",
        "--latency-table", table, *CALIBRATION, "--out", tmp_path / "out", "--json",
    )  # fmt: skip
    assert run.code == 0, run.err
    assert table.read_bytes() == before
    metrics = {m["name"]: m for m in json.loads(run.out)["metrics"]}
    expected, measured = metrics["budget: latency"]["values"], metrics["latency of a request"]["values"]
    assert expected["pruned"] <= 0.8 * expected["dense"]
    # the same clock: attention over positions of the cache is all that differs
    assert measured["pruned"] / measured["dense"] == pytest.approx(expected["pruned"] / expected["dense"], rel=0.02)
    cache = metrics["budget: bytes of the KV cache"]
    assert cache["values"]["pruned"] == 0.5 * cache["values"]["dense"]
    assert cache["protocol"] == "at most 50.0% asked, 50.0% expected"
    plan = json.loads((tmp_path / "out" / "plan" / "plan.json").read_text())
    assert plan["provenance"][0]["budgets"]["latency"]["asked"] == 0.8
    html = (tmp_path / "out" / "report.html").read_text()
    assert "80.0 % of the latency and 50.0 % of the bytes of the KV cache left" in html


def test_a_recipe_holds_budgets_and_table(cli, table, tiny_checkpoint, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"model: {tiny_checkpoint}\nlatency_table: {table}\n"
        "steps:\n  - method: magnitude_sp\n    budget: {latency: 0.9, params: 0.95}\n"
        f"    options: {{variants: scores, workload: '{WORKLOAD}'}}\n"
    )
    run = cli("prune", "--recipe", recipe, "--dry-run", "--json")
    assert run.code == 0, run.err
    (plan,) = json.loads(run.out)["plans"]
    assert plan["provenance"][0]["options"]["budget"] == "latency=0.9,params=0.95"
    budgets = plan["provenance"][0]["budgets"]
    assert all(b["pruned"] <= b["asked"] * b["dense"] for b in budgets.values()) and len(budgets) == 2


def test_uniform_gives_a_plain_checkpoint(cli, tiny_checkpoint, tmp_path):
    run = cli(
        "prune", tiny_checkpoint, "--method", "flap", "--sparsity", 0.3, "--uniform", *CALIBRATION,
        "--out", tmp_path / "out", "--no-measure", "--no-report",
    )  # fmt: skip
    assert run.code == 0, run.err
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "per_layer_config" not in config and "auto_map" not in config
    assert not list((tmp_path / "out").glob("*.py"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--budget", "params", "--budget", "latency=0.7"], "params takes a fraction of the dense model"),
        (["--budget", "latency=0.7", "--sparsity", "0.2"], "both say how much stays"),
        (["--budget", "params=0.7", "--latency-table", "t.csv"], "a latency table is for a budget of latency"),
        (["--budget", "kv_bytes=0.1"], "can't be met: with at least 1 unit(s) kept in every group"),
    ],
)
def test_one_line_says_what_is_wrong(cli, tiny_checkpoint, arguments, said):
    run = cli("prune", tiny_checkpoint, "--method", "magnitude_sp", *arguments, *CALIBRATION, "--dry-run")
    assert run.code in (1, 2) and run.out == "" and said in run.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--workload", "prompt=none"], "workload prompt must be a whole number"),
        (["--heads", "all"], "--heads must be kv or query"),
        (["--workload", "prompt=5000"], "5"),
    ],
)
def test_misuse_of_latency_table(cli, tiny_checkpoint, arguments, said):
    run = cli("latency-table", tiny_checkpoint, *arguments)
    assert run.code in (1, 2) and run.out == "" and said in run.err


def test_latency_table_is_not_for_traced_networks(cli):
    run = cli("latency-table", "net.onnx")
    assert run.code == 2 and "is for language models" in run.err
