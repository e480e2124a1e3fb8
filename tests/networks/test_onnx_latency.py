"""Latency as a budget of ONNX models, against a clock that counts multiply-accumulates; and once in real time."""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import secateur as sc
from channel_networks import Attention, Residual
from onnx_models import Net
from secateur import timing
from secateur.errors import MissingExtraError, OptionError, UnsupportedModelError, UsageError
from secateur.latencytable import LatencyTable
from secateur.networks.onnxcalls import OnnxCalls
from secateur.plans import Plan
from secateur.structure.onnx import load_onnx, onnx_anatomy

NETWORKS = {"residual": (Residual, (3, 12, 12)), "attention": (Attention, (7, 6))}
PER_OPERATION = 1e-6
"""Milliseconds that a multiply-accumulate takes on our clock."""


def operations(work) -> int:
    """Multiply-accumulates of a call that is timed; of one alone by hand, which is quicker."""
    if len(work.model.graph.node) > 1:
        return onnx_anatomy(work.model).total.macs
    (node,) = work.model.graph.node
    shapes = {tensor.name: list(tensor.dims) for tensor in work.model.graph.initializer} | dict(work.sizes)
    if node.op_type == "Conv":
        (batch, _, *image), weight = (shapes[name] for name in node.input[:2])
        return batch * math.prod(image) * math.prod(weight)  # every one of them keeps the size of its image
    if node.op_type in ("MatMul", "Gemm"):
        first, second = (shapes[name] for name in node.input[:2])
        return math.prod(first) * (second[-1] if node.op_type == "MatMul" else math.prod(second) // first[-1])
    return 0


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx")
    for name, (cls, shape) in NETWORKS.items():
        example = (torch.zeros(4, *shape),)
        torch.onnx.export(cls().eval(), example, folder / f"{name}.onnx", dynamo=True, verbose=False)
    return folder


@pytest.fixture
def clock(monkeypatch):
    """Counts what is timed; a call of the whole model takes ``factor`` times what its parts do, and ``rest``; a call
    alone takes ``own`` more than in the model."""
    state = {"timed": 0, "factor": 1.0, "rest": 0.0, "own": 0.0}

    def take_turns(works, repeats, devices):
        state["timed"] += 1
        taken = {name: operations(work) * PER_OPERATION for name, work in works.items()}
        if "1" in works:
            taken = {name: state["factor"] * alone + state["rest"] for name, alone in taken.items()}
        else:
            taken = {name: alone + state["own"] for name, alone in taken.items()}
        # one of the repeats is slowed down by something else
        return {name: [9.0, *[time / 1000] * (repeats - 1)] for name, time in taken.items()}

    monkeypatch.setattr(timing, "take_turns", take_turns)
    return state


def pruned(files, network="residual", **arguments):
    given = {"method": "spa_l1", "sparsity": 0.4, "budget": "latency", "options": {"round_to": 4}, **arguments}
    return sc.prune(files / f"{network}.onnx", **given)


def expected(result):
    return next(m for m in result.report.metrics if m.name == "expected latency").values


def ran(model):
    """The model's outputs in onnxruntime, on ones."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {one.name: np.ones(one.shape, dtype=np.float32) for one in session.get_inputs()})


# -- what is expected --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", NETWORKS)
def test_a_clock_that_counts_operations_makes_latency_and_macs_the_same(clock, files, network):
    by_latency, by_macs = pruned(files, network), pruned(files, network, budget="macs")
    kept = [{n: k.tolist() for n, k in result.plan.keep.items()} for result in (by_latency, by_macs)]
    assert kept[0] == kept[1] and by_latency.report.achieved == pytest.approx(0.4, abs=0.1)
    macs = next(m for m in by_latency.report.metrics if m.name == "MACs").values
    assert expected(by_latency) == pytest.approx({n: count * PER_OPERATION for n, count in macs.items()}, rel=1e-6)


@pytest.mark.parametrize(("network", "round_to"), [("residual", 1), ("residual", 4), ("attention", 4)])
def test_what_is_expected_of_the_cut_model_is_what_it_takes(clock, files, network, round_to):
    result = pruned(files, network, sparsity=0.5, options={"round_to": round_to})
    taken = onnx_anatomy(result.model).total.macs * PER_OPERATION
    assert expected(result)["pruned"] == pytest.approx(taken, rel=0.02)
    assert result.report.achieved == pytest.approx(0.5, abs=0.15)
    assert all(np.isfinite(output).all() for output in ran(result.model))


@pytest.mark.parametrize(
    ("factor", "rest", "own"), [(1.0, 5.0, 0.0), (0.5, 0.0, 0.0), (1.25, 2.0, 0.0), (1.0, 0.0, 0.5)]
)
def test_what_fusing_saves_and_what_doesnt_shrink_is_told_from_two_widths(clock, files, factor, rest, own):
    clock |= {"factor": factor, "rest": rest, "own": own}
    result = pruned(files, sparsity=0.05)
    macs = next(m for m in result.report.metrics if m.name == "MACs").values
    assert expected(result) == pytest.approx({n: rest + factor * count * PER_OPERATION for n, count in macs.items()})


def test_what_may_stay_is_a_budget_too(clock, files):
    asked = pruned(files, sparsity=None, budget={"latency": 0.7})
    assert not asked.plan.diff(pruned(files, sparsity=0.3).plan)
    assert asked.plan.provenance[0].options["sparsity"] == 0.3 and asked.report.requested == "30.0 % of the latency"
    assert not pruned(files, sparsity=None, budget="macs=0.7").plan.diff(
        pruned(files, sparsity=0.3, budget="macs").plan
    )


def test_calls_of_the_same_sizes_are_timed_once_and_those_that_never_shrink_not_at_all(clock, tmp_path):
    net = Net(2, 4)
    hidden = net.dense("x", 4, 8)
    for _ in range(3):
        hidden = net.dense(net("Relu", hidden), 8, 8)
    logits = net("Softmax", net.dense(hidden, 8, 5))
    onnx.save(net.model(logits), tmp_path / "net.onnx")
    table = tmp_path / "table.json"
    sc.prune(tmp_path / "net.onnx", method="spa_l1", sparsity=0.2, budget="latency", latency_table=table)
    entries = json.loads(table.read_text())["entries"]
    # the first product reads the input and the last makes the output; the last sum and its soft-maximum don't shrink
    assert sorted(name.split("(")[0] for name in entries if not name.startswith("whole")) == [
        *("Add", "MatMul", "MatMul", "MatMul", "Relu"),
    ]
    (square,) = [e for name, e in entries.items() if "float32[2, 8a], float32[8a, 8b]" in name]
    assert np.shape(square["milliseconds"]) == (8, 8) and square["widths"] == [[n / 8 for n in range(1, 9)]] * 2


def test_settings_follow_the_widths(clock, files):
    """Calls with sizes, bounds and groups in them run alone at every width: in onnxruntime, as they are timed."""
    net = Net(2, 3, 8, 8)
    x = net.conv(net("Relu", net.conv("x", 3, 16)), 16, 16, group=4)
    first, second = net("Split", x, net.ints(8, 8), outputs=2, axis=1)
    x = net("Concat", net("Slice", first, net.ints(0), net.ints(8), net.ints(1)), second, axis=1)
    x = net("Expand", net("ReduceMean", x, net.ints(2, 3)), net.ints(2, 16, 4, 4))
    model = net.model(net.conv(x, 16, 5))
    anatomy = onnx_anatomy(model)
    calls = OnnxCalls(anatomy, None)
    names = set()
    for call in calls.found(4):
        for width in call.widths:
            for removed in width.shares(anatomy.trace.units, 4).values():
                calls.alone(call, removed)()
        names.add(call.key.split("(")[0])
    assert {"Conv", "Relu", "Split", "Slice", "Concat", "ReduceMean", "Expand"} <= names


# -- the table ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["table.json", "table.csv"])
def test_a_table_is_measured_once_and_gives_the_same_plan_again(clock, files, tmp_path, name):
    table, steps = tmp_path / name, []
    first = pruned(files, latency_table=table, progress=lambda *step: steps.append(step))
    timed = clock["timed"]
    assert timed > 0 and steps[-1][0] == "latency" and steps[-1][1] == steps[-1][2]
    again = pruned(files, latency_table=table)
    assert clock["timed"] == timed
    for folder, result in (("a", first), ("b", again)):
        result.plan.save(tmp_path / folder)
    for file in ("plan.json", "plan.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    plan = Plan.load(tmp_path / "a")
    assert sc.apply(plan, files / "residual.onnx").SerializeToString() == first.model.SerializeToString()
    kept = LatencyTable.open(table)
    about = f"{kept.machine['cpu']}, {torch.get_num_threads()} threads, onnxruntime {onnxruntime.__version__}"
    assert plan.provenance[0].notes[-1].endswith(f" {len(kept.entries) - 1} kinds of calls timed alone; {about}")
    other = tmp_path / ("copy.csv" if name.endswith("json") else "copy.json")
    kept.path = other
    kept.save()
    assert not first.plan.diff(pruned(files, latency_table=other).plan) and clock["timed"] == timed


def test_modules_and_models_share_a_table(clock, files, tmp_path, monkeypatch):
    table = tmp_path / "table.json"
    pruned(files, latency_table=table)
    before = LatencyTable.open(table)
    monkeypatch.setattr(timing, "take_turns", lambda works, repeats, devices: {name: [1.0] * repeats for name in works})
    module, x = Residual().eval(), torch.zeros(4, 3, 12, 12)
    options = {"round_to": 4}
    sc.plan(
        module,
        example_inputs=(x,),
        method="spa_l1",
        sparsity=0.0,
        budget="latency",
        options=options,
        latency_table=table,
    )
    after = LatencyTable.open(table)
    assert before.entries.keys() < after.entries.keys() and after.onnxruntime == onnxruntime.__version__


def test_a_table_of_another_machine_is_used_but_not_mixed(clock, files, tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    first = pruned(files, latency_table=path)
    document = json.loads(path.read_text())
    document["machine"]["cpu"], document["onnxruntime"] = "abacus", "0.1"
    path.write_text(json.dumps(document))
    timed, before = clock["timed"], path.read_bytes()
    with pytest.raises(UsageError, match=r"lacks \d+ measurements of this network, and was made where cpu is abacus"):
        pruned(files, "attention", latency_table=path)
    # what isn't measured here needs nothing to measure with
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    result = pruned(files, latency_table=path)
    assert not first.plan.diff(result.plan) and clock["timed"] == timed and path.read_bytes() == before
    about = f"; abacus, {torch.get_num_threads()} threads, onnxruntime 0.1"
    assert result.plan.provenance[0].notes[-1].endswith(about)


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_without_onnxruntime_it_says_how_to_get_it(files, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(
        MissingExtraError, match=r"timing ONNX models needs onnxruntime, .*'secateur\[onnx\]'"
    ) as caught:
        pruned(files, latency_table=tmp_path / "table.json")
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_user_mistakes_are_one_sentence(clock, files, tmp_path):
    table = tmp_path / "table.json"
    with pytest.raises(UsageError, match="latency_table is for budget='latency', got budget='macs'"):
        pruned(files, budget="macs", latency_table=table)
    with pytest.raises(OptionError, match="both say how much stays"):
        pruned(files, budget="latency=0.7")
    with pytest.raises(OptionError, match=r"must lie in \(0, 1\], got 1.2"):
        pruned(files, sparsity=None, budget="latency=1.2")
    with pytest.raises(OptionError, match="channels leave for one budget, got latency, macs"):
        pruned(files, sparsity=None, budget="latency=0.7,macs=0.5")
    with pytest.raises(OptionError, match="did you mean 'latency'"):
        pruned(files, sparsity=None, budget="latenzy=0.7")
    assert clock["timed"] == 0 and not table.exists()


@pytest.mark.parametrize(
    ("works", "message"),
    [("1", "can't run the network on its example inputs"), ("", r"can't time Conv \(.*\) alone")],
)
def test_a_call_that_fails_is_named(clock, files, monkeypatch, tmp_path, works, message):
    take_turns = timing.take_turns

    def fail(given, repeats, devices):
        if works in given:
            raise onnxruntime.capi.onnxruntime_pybind11_state.Fail("no kernel\nfor it")
        return take_turns(given, repeats, devices)

    monkeypatch.setattr(timing, "take_turns", fail)
    with pytest.raises(UnsupportedModelError, match=f"{message}: no kernel") as caught:
        pruned(files, latency_table=tmp_path / "table.json")
    assert "\n" not in str(caught.value) and not (tmp_path / "table.json").exists()


@pytest.mark.parametrize("network", NETWORKS)
def test_real_time_is_taken(files, tmp_path, network):
    """Without the clock of our own: a table of true times, all of them positive. Here of a model in memory."""
    table, model = tmp_path / "table.json", load_onnx(files / f"{network}.onnx")
    options = {"round_to": 8}
    sc.plan(model, method="spa_l1", sparsity=0.0, budget="latency", options=options, latency_table=table)
    entries = LatencyTable.open(table).entries
    assert len(entries) > 5 and all((entry.milliseconds > 0).all() for entry in entries.values())
