"""A comparison from methods to verdict: what is in it, what is run how often, and that it goes on where it was."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from dataclasses import replace

import pytest

import secateur as sc
from secateur.comparison import compare
from secateur.comparison.table import columns, mark
from secateur.comparison.verdict import probability_better
from secateur.errors import MissingExtraError, OutputError, UnsupportedModelError, UsageError
from secateur.healing.recovery import states
from secateur.plans import Plan
from secateur.report.numbers import format_value
from secateur.sweep import worker

METHODS = ["random_sp", "magnitude_sp", "flap", "shortgpt", "wanda", "wanda_sp:heal=refit"]
QUICK = {"samples": 2, "length": 32, "windows": 6}
PERPLEXITY = "perplexity:builtin"


def row_of(comparison, method, sparsity):
    return next(row for row in comparison.rows if (row.method, row.sparsity) == (method, sparsity))


def test_the_table_has_a_row_for_everything_that_was_asked(compared):
    header, rows = columns(compared.comparison)
    assert header == ["sparsity", "method", "verdict", "perplexity", "removed", "params", "MACs", "s", "memory"]
    assert [row[:2] for row in rows] == [
        ["", "dense"],
        *([s if method == METHODS[0] else "", method] for s in ("0.3", "0.5") for method in METHODS),
    ]
    marks = [row[2] for row in rows[-len(METHODS) :]]
    # a model that has learned nothing loses nothing, whatever is cut
    assert marks == ["≈ best"] * len(METHODS)
    clear = replace(compared.comparison.first_verdicts[1], probabilities=dict.fromkeys(METHODS, 1.0))
    decided = replace(compared.comparison, verdicts=(clear,))
    assert sorted(row[2] for row in columns(decided)[1][-len(METHODS) :]) == ["", "", "", "", "", "best"]
    # with all of a block gone there is half left, and of two blocks none is three tenths
    assert mark(compared.comparison, row_of(compared.comparison, "shortgpt", 0.3)) == "off budget"
    assert row_of(compared.comparison, "shortgpt", 0.5).meets_budget
    assert " ± " in rows[1][3] and " ± " not in rows[2][3]


def test_a_row_is_what_prune_and_evaluate_give(compared, tiny_checkpoint):
    model, tokenizer = sc.load(tiny_checkpoint, dtype="auto")
    result = sc.prune(
        model, tokenizer, method="wanda_sp", sparsity=0.5, heal="refit", samples=2, length=32, random_windows=True
    )
    table = sc.evaluate({"x": result.model}, tokenizer, [PERPLEXITY, "size", "macs"], length=32, windows=6)
    row = row_of(compared.comparison, "wanda_sp:heal=refit", 0.5)
    assert row.removed == result.report.achieved
    assert row.values(PERPLEXITY)[0] == table["perplexity"].values["x"]
    assert row.mean("parameters") == table["parameters"].values["x"]
    assert row.mean("MACs") == table["MACs"].values["x"] == linear_weights(result.model)
    assert row.records[0].parts(PERPLEXITY) == table["perplexity"].parts["x"]
    assert row.seconds and row.peak_bytes and row.peak_bytes > 1e8
    for layer, cut in enumerate(result.report.layers):
        before, after = cut.units["neuron"]
        assert row.records[0].kept["neuron"][layer] == after / before
        assert row.records[0].kept["weights"][layer] == 1 - cut.sparsity


def linear_weights(model):
    import torch

    return sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))


def test_only_what_no_seed_changes_runs_once(compared):
    for row in compared.comparison.rows:
        several = row.method != "magnitude_sp"
        assert [record.values["seed"] for record in row.records] == ([0, 1] if several else [0])
        assert (row.spread(PERPLEXITY) is not None) == several


def test_every_seed_draws_the_calibration_text_of_all_methods(compared):
    texts = {}
    for method in ("flap", "shortgpt", "wanda"):
        for seed in (0, 1):
            plan = Plan.load(compared.folder / "plans" / f"{method}-sparsity=0.5-seed={seed}")
            calibration = plan.provenance[0].calibration
            assert calibration.random_windows and calibration.seed == seed
            texts.setdefault(seed, set()).add(calibration.sha256)
    # the same windows for all methods, and others with another seed
    assert [len(several) for several in texts.values()] == [1, 1] and texts[0] != texts[1]
    row = row_of(compared.comparison, "random_sp", 0.5)
    first, second = row.values(PERPLEXITY)
    assert first != second and row.mean(PERPLEXITY) == pytest.approx((first + second) / 2)
    assert row.spread(PERPLEXITY) == pytest.approx(abs(first - second) / 2**0.5)


def test_the_verdict_is_among_those_that_met_the_budget(compared):
    low, high = compared.comparison.first_verdicts
    assert (low.sparsity, high.sparsity, low.metric) == (0.3, 0.5, PERPLEXITY)
    assert "shortgpt" not in low.values and "shortgpt" in high.values
    means = {row.method: row.mean(PERPLEXITY) for row in compared.comparison.rows if row.sparsity == 0.5}
    assert high.best == min(means, key=means.get) and list(high.values.values()) == sorted(high.values.values())
    best, second = (row_of(compared.comparison, name, 0.5) for name in (high.best, high.runner_up))
    parts = [[record.parts(PERPLEXITY) for record in row.records] for row in (best, second)]
    assert high.probability == probability_better(*parts, higher_is_better=False, exponential=True)
    note = "shortgpt removed 0.0 % where 30.0 % was asked for, and has no part in the verdict"
    assert note in compared.comparison.notes
    assert "wanda sets weights to zero: parameters, MACs and time stay those of the dense model" in (
        compared.comparison.notes
    )
    dense = compared.comparison.dense
    assert row_of(compared.comparison, "wanda", 0.5).mean("MACs") == dense.metric("MACs")


def test_methods_that_need_the_same_statistics_share_them(compared):
    by_name = {row.method: row for row in compared.comparison.rows if row.sparsity == 0.5}
    # 0.3 took them
    assert by_name["flap"].shared and not row_of(compared.comparison, "flap", 0.3).shared
    assert not by_name["magnitude_sp"].shared and not by_name["wanda"].shared


def test_two_workers_give_what_one_gives(compared, tiny_checkpoint, tmp_path):
    pytest.importorskip("ray")
    how = {"methods": METHODS[:3], "sparsity": [0.5, 0.3], "seeds": [0, 1], "tolerance": 0.04, **QUICK}
    found = compare(str(tiny_checkpoint), workers=2, out=tmp_path / "out", **how)
    for row in found.rows:
        alone = row_of(compared.comparison, row.method, row.sparsity)
        assert row.values(PERPLEXITY) == pytest.approx(alone.values(PERPLEXITY), rel=1e-5)
        assert row.removed == alone.removed and len(row.records) == len(alone.records)
    busy = {record.worker for row in found.rows for record in row.records}
    assert len(busy) == 2 and os.getpid() not in busy
    for mine, theirs in zip(found.overlaps, compared.comparison.overlaps, strict=True):
        assert mine.jaccard == [line[:3] for line in theirs.jaccard[:3]]
    assert found.notes[0] == "2 workers took points at the same time: seconds are longer than those of one alone"


def test_overlaps_hold_for_the_plans_in_the_folder(compared):
    folder = compared.folder
    for overlap in compared.comparison.overlaps:
        assert overlap.methods == tuple(METHODS)
        assert all(overlap.jaccard[a][b] == overlap.jaccard[b][a] for a in range(6) for b in range(6))
    plan = Plan.load(folder / "plans" / "flap-sparsity=0.5-seed=0")
    assert plan.method == "flap"


def test_json_holds_it_all(compared):
    document = json.loads((compared.folder / "compare.json").read_text(encoding="utf8"))
    assert document == json.loads(json.dumps(compared.comparison.to_dict()))
    assert [row["method"] for row in document["rows"]] == METHODS * 2
    flap = next(row for row in document["rows"] if row["method"] == "flap")
    assert len(flap["parts"][PERPLEXITY][0]) == 6 and (compared.folder / flap["plans"][0] / "plan.json").is_file()
    assert [v["sentence"] for v in document["verdicts"]] == [v.sentence for v in compared.comparison.verdicts]
    assert document["dense"]["protocols"]["MACs"].startswith("linear layers, one token")


def without_times(document):
    kept = {key: value for key, value in document.items() if key != "rows"}
    times = ("seconds", "stages", "peak_bytes", "shared_statistics")
    return {**kept, "rows": [{k: v for k, v in row.items() if k not in times} for row in document["rows"]]}


def test_it_goes_on_after_an_interrupt_with_the_same_result(tiny_checkpoint, tmp_path, monkeypatch):
    asked = {"methods": "random_sp,flap", "sparsity": 0.5, "seeds": [0, 1], **QUICK}
    whole = compare(str(tiny_checkpoint), out=tmp_path / "whole", **asked)
    counted, run = Counter(), worker.Worker.run

    def interrupted(self, point):
        if len(counted) == 3:
            raise KeyboardInterrupt
        counted[point.name if point else "dense"] += 1
        return run(self, point)

    monkeypatch.setattr(worker.Worker, "run", interrupted)
    with pytest.raises(KeyboardInterrupt, match="2 of 4 points are done: --resume goes on with the rest"):
        compare(str(tiny_checkpoint), out=tmp_path / "out", **asked)
    monkeypatch.setattr(worker.Worker, "run", lambda self, point: counted.update([point.name]) or run(self, point))
    resumed = compare(str(tiny_checkpoint), out=tmp_path / "out", resume=True, **asked)
    assert set(counted.values()) == {1} and len(counted) == 5
    assert without_times(resumed.to_dict()) == without_times(whole.to_dict())


def test_a_comparison_that_grows_measures_what_is_new(tiny_checkpoint, tmp_path, monkeypatch):
    asked = {"sparsity": 0.5, "out": tmp_path / "out", **QUICK}
    compare(str(tiny_checkpoint), methods="magnitude_sp,flap", **asked)
    run, counted = worker.Worker.run, []
    monkeypatch.setattr(worker.Worker, "run", lambda self, point: counted.append(point.name) or run(self, point))
    grown = compare(str(tiny_checkpoint), methods="wanda_sp,magnitude_sp,flap", resume=True, **asked)
    assert len(counted) == 1 and "wanda_sp" in counted[0]
    monkeypatch.undo()
    whole = compare(str(tiny_checkpoint), methods="wanda_sp,magnitude_sp,flap", **{**asked, "out": tmp_path / "whole"})
    assert without_times(grown.to_dict()) == without_times(whole.to_dict())


def test_tasks_side_by_side_and_latency_in_turns_with_the_dense_model(tiny_checkpoint, tmp_path, monkeypatch):
    from secateur import timing

    turns = []

    def take_turns(works, repeats, devices, step=None):
        turns.append({name.partition("/")[0] for name in works})
        return {name: [1.0 if name.startswith("dense") else 0.5] * repeats for name in works}

    monkeypatch.setattr(timing, "take_turns", take_turns)
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog, again and again\n" * 60, encoding="utf8")
    asked = {"methods": "random_sp,magnitude_sp", "sparsity": 0.5, "tasks": [PERPLEXITY, f"perplexity:{text}"], **QUICK}
    found = compare(str(tiny_checkpoint), out=tmp_path / "out", latency=True, tolerance=0.02, **asked)
    assert turns[0] == {"dense"} and all("dense" in names and len(names) == 2 for names in turns[1:])
    dense = found.dense.metric("latency of a request")
    assert row_of(found, "random_sp", 0.5).request_ms(found.dense) == dense / 2
    header, rows = columns(found)
    assert rows[-1][header.index("ms/request")].endswith("(×2.00)")
    # tasks stand side by side, each with a verdict, and the first one decides
    assert header[3:5] == [PERPLEXITY, "perplexity:text.txt"]
    assert [verdict.metric for verdict in found.verdicts] == [PERPLEXITY, "perplexity:text.txt"]
    assert found.first_verdicts == found.verdicts[:1] and found.verdicts[1].probability is not None
    assert any(
        note.startswith("one seed, and so one draw of the calibration text, for random_sp:") for note in found.notes
    )


def test_plugins_take_part_and_failures_are_shown(tiny_checkpoint, tmp_path):
    from secateur.methods import get_method, registry

    Magnitude = get_method("magnitude_sp")

    @sc.register("breaks")
    class Breaks(Magnitude):
        """Fails."""

        def score(self, target, seen):
            raise ValueError("no luck")

    try:
        found = compare(
            str(tiny_checkpoint), methods=["magnitude_sp", "breaks"], sparsity=0.5, out=tmp_path / "out", **QUICK
        )
    finally:
        registry._registered.pop("breaks")
    row = row_of(found, "breaks", 0.5)
    assert not row.done and row.error == "ValueError: no luck" and mark(found, row) == "failed"
    assert found.first_verdicts[0].sentence.startswith("Sparsity 0.5: magnitude_sp is the only method")
    assert [record.name for record in found.results.failed] == ["breaks-sparsity=0.5-seed=0"]


@pytest.mark.parametrize(
    ("methods", "more", "error", "said"),
    [
        ("wanda,magnitude:pattern=2:7", {"sparsity": 2 / 7}, UsageError, "needs a multiple of 7 inputs"),
        ("flap,magnitude_sp", {"tasks": "perplxity"}, UsageError, "did you mean 'perplexity'?"),
        ("flap,magnitude_sp", {"tolerance": 1.5}, UsageError, "tolerance must lie in [0, 1)"),
        ("flap,magnitude_sp", {"workers": 0}, UsageError, "needs one worker at least, got 0"),
        ("flap,magnitude_sp", {"latency": True, "workers": 2}, UsageError, "a latency is measured by one worker"),
    ],
)
def test_what_can_be_known_before_is_refused_before(tiny_checkpoint, tmp_path, monkeypatch, methods, more, error, said):
    monkeypatch.setattr(worker.Worker, "run", lambda self, point: pytest.fail("something ran"))
    with pytest.raises(error) as caught:
        compare(str(tiny_checkpoint), methods=methods, out=tmp_path / "out", **{"sparsity": 0.5, **QUICK, **more})
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_training_without_its_library_is_refused_before(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr(worker.Worker, "run", lambda self, point: pytest.fail("something ran"))
    how = {"methods": "flap,magnitude_sp", "sparsity": 0.5, "out": tmp_path / "out", **QUICK}
    with pytest.raises(MissingExtraError, match=r"^training adapters needs peft, .*pip install 'secateur\[train\]'"):
        compare(str(tiny_checkpoint), heal="lora:steps=1", **how)
    assert not (tmp_path / "out").exists()


def test_a_model_that_a_method_can_not_cut_is_refused_before(tmp_path, monkeypatch, make_tokenizer):
    from transformers import BloomConfig, BloomForCausalLM

    config = BloomConfig(vocab_size=300, hidden_size=16, n_layer=2, n_head=2)
    BloomForCausalLM(config).save_pretrained(tmp_path / "bloom")
    make_tokenizer(vocab_size=300).save_pretrained(tmp_path / "bloom")
    monkeypatch.setattr(worker.Worker, "run", lambda self, point: pytest.fail("something ran"))
    with pytest.raises(UnsupportedModelError, match=r"^flap-sparsity=0\.5-seed=0: .*bloom"):
        compare(tmp_path / "bloom", methods="magnitude,flap", sparsity=0.5, out=tmp_path / "out", **QUICK)
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_else_is_left_alone(tiny_checkpoint, tmp_path, monkeypatch, compared):
    from secateur import api

    monkeypatch.setattr(api, "load", lambda *a, **k: pytest.fail("a model was loaded"))
    (tmp_path / "mine.txt").write_text("x")
    for folder, said in ((tmp_path, "holds no sweep"), (compared.folder, "pass --resume to go on")):
        with pytest.raises(OutputError, match=said):
            compare(str(tiny_checkpoint), methods="flap,magnitude_sp", sparsity=0.5, out=folder, **QUICK)


def test_what_was_there_before_the_training_stands_beside_it(compared, tiny_checkpoint, tmp_path, monkeypatch):
    heal = "lora:steps=2,batch=1,length=32,lr=0.01"
    methods = ["magnitude_sp", "wanda_sp:heal=refit"]
    remembered, answering = [], states.instead
    monkeypatch.setattr(states, "instead", lambda *given: remembered.append(1) or answering(*given))
    found = compare(str(tiny_checkpoint), methods=methods, sparsity=0.5, heal=heal, out=tmp_path / "out", **QUICK)
    # both methods see the same batches, of which the teacher answers once
    assert len(remembered) == 2
    header, rows = columns(found)
    assert header[3:6] == ["perplexity", "untrained", "removed"] and rows[0][4] == "–"
    page = (tmp_path / "out" / "compare.html").read_text(encoding="utf8")
    assert "untrained: what the first number was before the training" in page
    told = json.loads((tmp_path / "out" / "compare.json").read_text(encoding="utf8"))["rows"]
    for method, cells, entry in zip(methods, rows[1:], told, strict=True):
        row, cut = row_of(found, method, 0.5), row_of(compared.comparison, method, 0.5)
        # the same cut as without a training, whose repair it has; then something was learned
        assert row.values(PERPLEXITY, untrained=True) == cut.values(PERPLEXITY)[:1] != row.values(PERPLEXITY)
        assert cells[4] == format_value(cut.values(PERPLEXITY)[0])
        before = entry["untrained"][PERPLEXITY]
        assert before["mean"] == cut.values(PERPLEXITY)[0] and before["parts"] == [cut.records[0].parts(PERPLEXITY)]
        assert set(entry["stages"]) == {"plan", "cut", "heal"} and entry["seconds"] == sum(entry["stages"].values())
    # a second look at the journal finds it again
    again = compare(
        str(tiny_checkpoint), methods=methods, sparsity=0.5, heal=heal, out=tmp_path / "out", resume=True, **QUICK
    )
    assert [row.mean(PERPLEXITY, untrained=True) for row in again.rows] == [
        row.mean(PERPLEXITY, untrained=True) for row in found.rows
    ]


def test_it_prints_itself(compared):
    text = str(compared.comparison)
    assert "wanda_sp:heal=refit" in text and compared.comparison.first_verdicts[1].sentence in text
