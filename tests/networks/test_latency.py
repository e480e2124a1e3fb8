"""Latency as a budget, against a clock that counts floating-point operations: then latency and MACs are the same."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import secateur as sc
from channel_networks import Attention, Residual
from secateur import timing
from secateur.errors import BudgetError, DataError, UnsupportedModelError, UsageError
from secateur.latencytable import Entry, LatencyTable
from secateur.networks import timedcalls
from secateur.plans import Plan
from secateur.structure.resize import named_arguments

NETWORKS = {"residual": (Residual, (3, 12, 12)), "attention": (Attention, (7, 6))}
PER_OPERATION = 1e-6
"""Milliseconds that one floating-point operation takes on our clock."""


def operations(work) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@pytest.fixture
def clock(monkeypatch):
    """Counts what is timed; a call of the whole network takes ``factor`` times what its parts do, and ``rest``."""
    state = {"timed": 0, "factor": 1.0, "rest": 0.0}

    def take_turns(works, repeats, devices):
        state["timed"] += 1
        taken = {name: operations(work) * PER_OPERATION for name, work in works.items()}
        if "1" in works:
            taken = {name: state["factor"] * alone + state["rest"] for name, alone in taken.items()}
        # one of the repeats is slowed down by something else
        return {name: [9.0, *[time / 1000] * (repeats - 1)] for name, time in taken.items()}

    monkeypatch.setattr(timing, "take_turns", take_turns)
    return state


def made(network="residual"):
    cls, shape = NETWORKS[network]
    module = cls().eval()
    return module, torch.randn(4, *shape, generator=torch.Generator().manual_seed(1))


def pruned(network="residual", **arguments):
    module, x = made(network)
    given = {"method": "spa_l1", "sparsity": 0.4, "budget": "latency", **arguments}
    return module, x, sc.prune(module, example_inputs=(x,), **given)


# -- what is expected --------------------------------------------------------------------------------------------------


def test_a_clock_that_counts_operations_makes_latency_and_macs_the_same(clock):
    _, _, by_latency = pruned()
    _, _, by_macs = pruned(budget="macs")
    assert {n: k.tolist() for n, k in by_latency.plan.keep.items()} == {
        n: k.tolist() for n, k in by_macs.plan.keep.items()
    }
    assert (
        by_latency.report.achieved == pytest.approx(by_macs.report.achieved, rel=1e-6) == pytest.approx(0.4, abs=0.03)
    )
    counted = {m.name: m.values for m in by_latency.report.metrics}
    for model, milliseconds in counted["expected latency"].items():
        assert milliseconds == pytest.approx(2 * counted["MACs"][model] * PER_OPERATION, rel=1e-6)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("round_to", [1, 4])
def test_what_is_expected_of_the_cut_network_is_what_it_takes(clock, network, round_to):
    _, x, result = pruned(network, sparsity=0.5, options={"round_to": round_to})
    expected = next(m for m in result.report.metrics if m.name == "expected latency")
    with torch.no_grad():
        taken = operations(lambda: result.model(x)) * PER_OPERATION
    assert expected.values["pruned"] == pytest.approx(taken, rel=0.02)
    assert result.report.achieved == pytest.approx(0.5, abs=0.15)


@pytest.mark.parametrize(("factor", "rest"), [(1.0, 5.0), (0.5, 0.0), (1.5, 0.0), (1.25, 2.0)])
def test_what_the_whole_takes_beside_its_parts_is_told_from_two_widths(clock, factor, rest):
    clock |= {"factor": factor, "rest": rest}
    _, _, result = pruned(sparsity=0.05)
    values = next(m for m in result.report.metrics if m.name == "expected latency").values
    macs = next(m for m in result.report.metrics if m.name == "MACs").values
    assert values == pytest.approx({n: rest + 2 * factor * count * PER_OPERATION for n, count in macs.items()})


def test_what_doesnt_shrink_bounds_the_budget(clock):
    clock["rest"] = 5.0
    with pytest.raises(BudgetError, match=r"can't remove 90\.0% of the latency"):
        pruned(sparsity=0.9)


def test_a_network_that_is_no_faster_when_narrow_is_scaled(clock):
    """Noise can make the narrow network the slower one; the rest is then none, and not negative."""
    clock |= {"factor": -1.0, "rest": 100.0}
    _, _, result = pruned()
    values = next(m for m in result.report.metrics if m.name == "expected latency").values
    macs = next(m for m in result.report.metrics if m.name == "MACs").values
    assert values["pruned"] / values["dense"] == pytest.approx(macs["pruned"] / macs["dense"])


def test_widths_between_the_measured_ones_are_interpolated():
    entry = Entry((np.array([0.5, 1.0]), np.array([0.25, 0.5, 1.0])), np.array([[1.0, 2.0, 4.0], [3.0, 6.0, 8.0]]))
    assert entry.at([0.5, 0.25]) == 1 and entry.at([1.0, 1.0]) == 8
    assert entry.at([0.75, 0.5]) == 4 and entry.at([1.0, 0.75]) == 7
    assert entry.at([0.75, 0.375]) == (1 + 2 + 3 + 6) / 4
    assert entry.at([0.1, 0.1]) == 1  # nothing is known below the smallest
    assert Entry((), np.array(3.0)).at([]) == 3 == Entry((np.array([1.0]),), np.array([3.0])).at([1.0])


@pytest.mark.parametrize(
    ("round_to", "widths"), [(1, {2, 3, 4, 6, 8, 9, 10, 12}), (4, {4, 8, 12}), (5, {5, 10, 12}), (8, {8, 12})]
)
def test_widths_are_multiples_of_what_stays_is_rounded_to(clock, tmp_path, round_to, widths):
    pruned(sparsity=0.1, options={"round_to": round_to}, latency_table=tmp_path / "table.json")
    entries = json.loads((tmp_path / "table.json").read_text())["entries"]
    (stem,) = [e for name, e in entries.items() if name.startswith("aten.conv2d.default(input=float32[4, 3, ")]
    assert {round(12 * share) for share in stem["widths"][0]} == widths
    (conv1,) = [
        e for name, e in entries.items() if "weight=float32[24a, 12b, 3, 3]" in name or "[24b, 12a, 3, 3]" in name
    ]
    assert [len(w) for w in conv1["widths"]] == list(np.shape(conv1["milliseconds"])) and len(conv1["widths"]) == 2


def test_calls_of_the_same_sizes_are_timed_once(clock, tmp_path):
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(4))

        def forward(self, x):
            for layer in self.layers:
                x = layer(x).relu()
            return x

    sc.plan(
        Twice(),
        example_inputs=(torch.zeros(2, 8),),
        method="spa_l1",
        sparsity=0.2,
        budget="latency",
        latency_table=tmp_path / "table.json",
    )
    entries = json.loads((tmp_path / "table.json").read_text())["entries"]
    # the first reads the input and the last makes the output, neither of which shrinks; relu before and at the end
    assert sorted(name.split("(")[0] for name in entries if not name.startswith("whole")) == [
        *["aten.linear.default"] * 3,
        *["aten.relu.default"] * 2,
    ]


def test_calls_whose_sizes_are_made_of_other_groups_are_timed_apart(clock):
    """Eight channels of which all can leave, and eight of which four can."""

    class Mixed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = torch.nn.Linear(3, 8), torch.nn.Linear(3, 4)
            self.one, self.other = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)

        def forward(self, x):
            return self.one(self.first(x)), self.other(torch.cat([self.second(x), x, x[:, :1]], dim=1))

    x = torch.zeros(2, 3)
    calls = timedcalls.timed_calls(sc.anatomy(Mixed(), example_inputs=(x,)), 1, torch.device("cpu"))
    wide = [c for c in calls if "weight=float32[8, 8a]" in c.key]
    assert len({c.key for c in wide}) == len(wide) == 2
    assert [len(c.widths[0].groups[0]) for c in wide] == [8, 4]
    result = sc.prune(Mixed(), example_inputs=(x,), method="spa_l1", sparsity=0.2, budget="latency")
    expected = next(m for m in result.report.metrics if m.name == "expected latency")
    taken = operations(lambda: result.model(x)) * PER_OPERATION
    assert expected.values["pruned"] == pytest.approx(taken, rel=1e-6)


def test_layouts_are_kept(monkeypatch):
    module, x = made()
    module, x = module.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    anatomy = sc.anatomy(module, example_inputs=(x,))
    calls = timedcalls.timed_calls(anatomy, 1, torch.device("cpu"))
    relu = next(call for call in calls if "relu" in str(call.node.target))
    seen = []
    seen = []
    monkeypatch.setattr(
        timedcalls, "resized", lambda cut, node: (lambda **given: seen.append(given), named_arguments(node))
    )
    timedcalls._work(anatomy.trace, relu.node, set(), torch.device("cpu"))()
    (tensor,) = seen[0].values()
    assert tensor.is_contiguous(memory_format=torch.channels_last) and tensor.shape == (4, 12, 12, 12)


# -- the table ---------------------------------------------------------------------------------------------------------


def test_a_table_is_measured_once_and_gives_the_same_plan_again(clock, tmp_path):
    table, steps = tmp_path / "here" / "table.json", []
    _, _, first = pruned(latency_table=table, progress=lambda *step: steps.append(step))
    timed = clock["timed"]
    assert timed > 0 and steps[-1][0] == "latency" and steps[-1][1] == steps[-1][2]
    _, _, again = pruned(latency_table=table)
    assert clock["timed"] == timed
    for name, result in (("a", first), ("b", again)):
        result.plan.save(tmp_path / name)
    for file in ("plan.json", "plan.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert list(table.parent.iterdir()) == [table]
    assert str(tmp_path) not in (tmp_path / "a" / "plan.json").read_text()


def test_the_plan_says_what_was_measured_and_where(clock, tmp_path):
    module, x, result = pruned(latency_table=tmp_path / "table.json")
    (note,) = result.plan.provenance[0].notes
    table = LatencyTable.open(tmp_path / "table.json")
    dense, cut = next(m for m in result.report.metrics if m.name == "expected latency").values.values()
    said = f"latency: {dense:.3g} ms measured, {cut:.3g} ms expected, from {len(table.entries) - 1} kinds of calls"
    assert note == f"{said} timed alone; {table.about}"
    assert f"{torch.get_num_threads()} threads, torch {torch.__version__}" in table.about
    assert result.report.requested == "40.0 % of the latency"
    plan = Plan.load(result.plan.save(tmp_path / "plan"))
    timed = clock["timed"]
    assert torch.equal(sc.apply(plan, module)(x), result.model(x)) and clock["timed"] == timed


def test_a_table_of_another_machine_is_used_but_not_mixed(clock, tmp_path):
    path = tmp_path / "table.json"
    _, _, first = pruned(latency_table=path)
    document = json.loads(path.read_text())
    document["machine"]["cpu"] = "abacus"
    path.write_text(json.dumps(document))
    timed = clock["timed"]
    _, _, result = pruned(latency_table=path)
    assert not first.plan.diff(result.plan) and clock["timed"] == timed
    assert "; abacus, " in result.plan.provenance[0].notes[0]
    before = path.read_bytes()
    with pytest.raises(UsageError, match=r"lacks \d+ measurements of this network, and was made where cpu is abacus"):
        pruned("attention", latency_table=path)
    assert path.read_bytes() == before and clock["timed"] == timed


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.pop("machine"),
        lambda d: d["entries"].update(x={"widths": [[0.5, 1.0]], "milliseconds": [1.0]}),
        lambda d: d["entries"].update(x={"widths": [[1.0, 0.5]], "milliseconds": [1.0, 2.0]}),
        lambda d: d["entries"].update(x={"widths": [[0.5, 1.0]], "milliseconds": [-1.0, 2.0]}),
        lambda d: d["entries"].update(x={"widths": [], "milliseconds": "fast"}),
        lambda d: d["entries"].update(x={"widths": [[0.5, 1.0]], "milliseconds": [[1.0], [2.0, 3.0]]}),
    ],
)
def test_a_damaged_table_is_refused(clock, tmp_path, change):
    path = tmp_path / "table.json"
    pruned(latency_table=path)
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(DataError, match="is not a table of latencies that secateur wrote"):
        pruned(latency_table=path)


def test_files_that_are_no_table_are_refused(tmp_path):
    (tmp_path / "torn.json").write_text('{"format_version": 1, ')
    with pytest.raises(DataError, match="not valid JSON"):
        pruned(latency_table=tmp_path / "torn.json")
    new = {"format_version": 2, "machine": {}, "torch": "9", "entries": {}}
    (tmp_path / "new.json").write_text(json.dumps(new))
    with pytest.raises(DataError, match="has format 2, and this version reads 1"):
        pruned(latency_table=tmp_path / "new.json")


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_user_mistakes_are_one_sentence(clock, tmp_path):
    with pytest.raises(UsageError, match="latency_table is for budget='latency', got budget='macs'"):
        pruned(budget="macs", latency_table=tmp_path / "table.json")
    assert clock["timed"] == 0


@pytest.mark.parametrize(
    ("works", "message"),
    [("1", "can't run the network on its example inputs"), ("", r"can't time aten::conv2d \(stem.0, .*\) alone")],
)
def test_a_call_that_fails_is_named(clock, monkeypatch, tmp_path, works, message):
    take_turns = timing.take_turns

    def fail(given, repeats, devices):
        if works in given:
            raise RuntimeError("no kernel\nfor it")
        return take_turns(given, repeats, devices)

    monkeypatch.setattr(timing, "take_turns", fail)
    with pytest.raises(UnsupportedModelError, match=f"{message}: no kernel") as caught:
        pruned(latency_table=tmp_path / "table.json")
    assert "\n" not in str(caught.value) and not (tmp_path / "table.json").exists()


def test_real_time_is_taken(tmp_path):
    """Without the clock of our own: a table of true times, all of them positive."""
    pruned(sparsity=0.0, options={"round_to": 4}, latency_table=tmp_path / "table.json")
    entries = LatencyTable.open(tmp_path / "table.json").entries
    assert all((entry.milliseconds > 0).all() for entry in entries.values())
