"""Latency of decoders as a budget, by a clock that counts floating-point operations: what is expected is then exact."""

from __future__ import annotations

import csv
import dataclasses

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import secateur as sc
from conftest import build_llama
from families import make_tiny, tiny_ids
from runs import tokens_of
from secateur import timing
from secateur.engine import decide
from secateur.errors import BudgetError, DataError, UnsupportedModelError, UsageError
from secateur.evaluation import make_task
from secateur.evaluation.base import Settings
from secateur.latencytable import Entry, LatencyTable
from secateur.methods import make_method
from secateur.models.decoders import decoder_anatomy
from secateur.models.latency import measure_decoder
from secateur.models.sources import Source
from secateur.models.surgery import Removal, layer_overrides, remove_units
from secateur.timing import Workload

LOAD = Workload(batch=2, prompt=12, new=3)


def operations(work) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@pytest.fixture
def clock(monkeypatch):
    """Counts what was timed."""
    timed = []

    def take_turns(works, repeats, devices, step=None):
        timed.append(list(works))
        return {name: [1e-3 * operations(work)] * repeats for name, work in works.items()}

    monkeypatch.setattr(timing, "take_turns", take_turns)
    return timed


def request_ms(model, load=LOAD):
    task = make_task(f"request:{load},repeats=1")
    (metric,) = task.measure({"model": model}, None, Settings())
    return metric.values["model"]


def measured(model, table=None, heads="kv", load=LOAD):
    return measure_decoder(Source(model), decoder_anatomy(model, heads=heads), load, table or LatencyTable())


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon"])
def test_what_is_expected_of_a_cut_model_is_what_it_takes(clock, family):
    model = make_tiny(family)
    latency = measured(model)
    assert latency.dense == pytest.approx(request_ms(model), rel=1e-3)
    plan = sc.plan(model, method="random_sp", sparsity=0.3, options={"seed": 3})
    groups = decoder_anatomy(model)
    expected = latency.dense - sum(latency.saved(groups[name])[len(kept)] for name, kept in plan.keep.items())
    assert len({len(kept) for name, kept in plan.keep.items()}) > 1
    # the cache of a decoding step grows by one position a step, which four steps see and three don't
    assert expected == pytest.approx(request_ms(sc.apply(plan, model)), rel=2e-2)


def test_a_model_that_was_cut_before_takes_less_from_the_start(clock):
    model = make_tiny("llama")
    cut = sc.prune(model, method="magnitude_sp", budget={"params": 0.6}, options={"variants": "scores"}).model
    assert layer_overrides(cut.config)
    assert measured(cut).dense == pytest.approx(request_ms(cut), rel=2e-2)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "opt", "falcon"])
def test_heads_that_have_left_every_block_take_no_time(clock, family):
    model = make_tiny(family)
    cut = sc.prune(model, method="random_sp", sparsity=0.55, options={"round_to": 8}).model
    assert {group.units for group in decoder_anatomy(cut).of_kind("kv_head")} <= {1, 2}
    assert measured(cut).dense == pytest.approx(request_ms(cut), rel=1e-3)
    heads = decoder_anatomy(cut).of_kind("kv_head")[0]
    assert len(measured(cut).saved(heads)) == heads.units + 1


@pytest.mark.parametrize("kv_heads", [2, 1])
def test_query_heads_that_are_shared_unequally_are_said_to_be_the_reason(clock, kv_heads):
    """As a method that removes query heads leaves them, or a config per layer."""
    model = build_llama()
    groups = decoder_anatomy(model, heads="query")
    remove_units(model, Removal.of(model, groups, {"layers.0.attention": torch.tensor([1, 3])}))
    if kv_heads == 1:
        remove_units(model, Removal.of(model, decoder_anatomy(model), {"layers.0.attention": torch.tensor([1])}))
    said = "blocks have from 1 to 2 query heads per key-value head"
    with pytest.raises(UnsupportedModelError, match=said + (".*or heads=query" if kv_heads == 2 else "")):
        measured(model)
    if kv_heads == 2:
        assert measured(model, heads="query").dense == pytest.approx(request_ms(model), rel=2e-2)
    else:
        with pytest.raises(UnsupportedModelError, match=said):
            measured(model, heads="query")


def test_a_table_is_measured_once_and_shared(clock, tmp_path):
    model, path = make_tiny("llama"), tmp_path / "table.json"
    first = measured(model, LatencyTable.open(path))
    times = len(clock)
    again = measured(make_tiny("llama", seed=5), LatencyTable.open(path))
    assert len(clock) == times and again.dense == first.dense
    measured(model, LatencyTable.open(path), load=dataclasses.replace(LOAD, new=0))
    assert len(clock) == 2 * times


def test_the_csv_file_is_the_same_table(clock, tmp_path):
    model, table = make_tiny("llama"), LatencyTable(tmp_path / "table.csv")
    latency = measured(model, table)
    table.entries['a call, "quoted"'] = Entry(
        (np.array([0.25, 1.0]), np.array([0.5, 0.75, 1.0])), np.arange(6.0).reshape(2, 3)
    )
    table.save()
    loaded = LatencyTable.open(table.path)
    assert (
        loaded.machine == table.machine and loaded.torch == table.torch and list(loaded.entries) == list(table.entries)
    )
    for name, entry in table.entries.items():
        assert np.array_equal(loaded.entries[name].milliseconds, entry.milliseconds)
        assert all(np.array_equal(a, b) for a, b in zip(loaded.entries[name].widths, entry.widths, strict=True))
    times = len(clock)
    assert measured(model, loaded).dense == latency.dense and len(clock) == times
    rows = list(csv.reader(table.path.read_text().splitlines()[1:]))
    assert rows[0] == ["call", "milliseconds", "a", "b"]


BROKEN = ["", "call,milliseconds\n", "# {}\na,b\n", "# {\n", "# {}\ncall,milliseconds,a,b\nx,1,0.5,1\nx,1,1,2\n"]


@pytest.mark.parametrize("text", BROKEN)
def test_a_damaged_csv_file_is_refused(text, tmp_path):
    (tmp_path / "table.csv").write_text(text)
    with pytest.raises(DataError, match="is not a table of latencies"):
        LatencyTable.open(tmp_path / "table.csv")


def test_a_table_of_another_machine_is_used_with_a_note(clock, tmp_path):
    model, path = make_tiny("llama"), tmp_path / "table.csv"
    table = LatencyTable(path, machine={**LatencyTable().machine, "cpu": "Another 9000"})
    with pytest.raises(UsageError, match=r"lacks 4 measurements .* where cpu is Another 9000 \(here "):
        measured(model, table)
    found = LatencyTable()
    measured(model, found)
    table.entries = {name.replace(" on cpu", " on cuda"): entry for name, entry in found.entries.items()}
    table.save()
    asked = {"budget": {"latency": 0.8}, "options": {"workload": str(LOAD), "variants": "scores"}}
    plan = sc.plan(model, method="magnitude_sp", latency_table=path, **asked)
    (note,) = [note for note in plan.provenance[0].notes if "another machine" in note]
    assert note.startswith("the latencies were measured on another machine (cpu is Another 9000, here ")


def test_latency_and_the_cache_are_met_together(clock, tmp_path):
    model, path = make_tiny("llama"), tmp_path / "table.json"
    method = make_method("flap", {"budget": "latency=0.8,kv_bytes=0.5", "workload": str(LOAD)})
    source, ids = Source(model), tiny_ids()
    how = {"dtype": torch.float32, "batch_tokens": 32, "progress": lambda *_: None, "latency_table": path}
    whole = decide(method, source, tokens_of(ids), **how).whole
    accounts = whole.budgets
    assert accounts["latency"].pruned <= 0.8 * accounts["latency"].dense
    assert accounts["kv_bytes"].pruned == 0.5 * accounts["kv_bytes"].dense
    assert [len(whole.keep[f"layers.{layer}.attention"]) for layer in range(3)] == [1, 1, 1]
    assert any("12 prompt tokens, 3 new tokens" in note for note in whole.notes)


def test_what_a_latency_can_not_become_is_said_before_anything_is_observed(clock, tmp_path):
    with pytest.raises(BudgetError, match=r"^budget latency=0\.01 can't be met: .* at least 0\.\d+ of its latency$"):
        sc.plan(
            make_tiny("llama"),
            method="magnitude_sp",
            budget={"latency": 0.01},
            options={"workload": str(LOAD), "variants": "scores"},
            latency_table=tmp_path / "table.json",
        )


def test_a_latency_table_without_a_latency_budget_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"a latency table is for a budget of latency, got budget params=0\.8"):
        sc.plan(
            make_tiny("llama"),
            method="magnitude_sp",
            budget={"params": 0.8},
            options={"variants": "scores"},
            latency_table=tmp_path / "table.json",
        )


def test_the_cache_folder_is_where_the_variable_says(monkeypatch, tmp_path):
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path))
    table = LatencyTable.cached()
    assert table.path is not None and table.path.parent == tmp_path / "latency" and not table.entries
