"""What the studies in ``benchmarks/`` rest on: memory of one process, the stages of a profile, and what is compared."""

import argparse
import importlib
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import secateur
import secateur as sc
import secateur.structure.graphcut
from families import make_tiny
from secateur import timing

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"

# as py-spy 0.4 prints them: thread, then frames from the outermost inwards, then the number of samples
RUNNER = "thread (7): MainThread;_run_code (<frozen runpy>:88);prune (/env/secateur/cli/prune.py:105)"
BLOCK = "Run.observe (/env/secateur/engine/run.py:90);BlockWalk._run (/env/secateur/observe/driver.py:90)"
FORWARD = "LlamaDecoderLayer.forward (/env/transformers/models/llama/modeling_llama.py:300)"
THREAD = "thread (8): reader;Thread._bootstrap (/usr/lib/python3.11/threading.py:1002)"
STACKS = {
    f"{RUNNER};{BLOCK};{FORWARD};Linear.forward (/env/torch/nn/modules/linear.py:125)": "forwards",
    f"{RUNNER};{BLOCK}": "driver",
    f"{RUNNER};{BLOCK};{FORWARD};Gram.update (/env/secateur/observe/products.py:60)": "statistics",
    f"{RUNNER};_prune_matrix (/v/secateur/engine/weights.py:9);obs_sweep (/v/secateur/solver/sweep.py:8)": "scoring",
    f"{RUNNER};load_model (/env/secateur/models/loading.py:55)": "reading",
    f"{RUNNER};save_model (/env/secateur/models/saving.py:70)": "writing",
    f"{RUNNER};Plan.write (/env/secateur/plans.py:200);dump (/usr/lib/python3.11/json/__init__.py:180)": "writing",
    f"{RUNNER};peak_bytes (/env/secateur/evaluation/size.py:120);{FORWARD}": "evaluation",
    f"{RUNNER};_find_and_load (<frozen importlib._bootstrap>:1176);<module> (/env/torch/__init__.py:1)": "imports",
    f"{RUNNER};sleep (/env/elsewhere.py:1)": "other",
    f"{THREAD};read_header (/env/secateur/tensorfiles.py:124)": "reading (background)",
    f"{THREAD};Event.wait (/usr/lib/python3.11/threading.py:629)": None,
    f"thread (7): MainThread;SequentialPipeline.__call__ (/p/llmcompressor/pipelines/pipeline.py:9);{FORWARD};"
    "WandaPruningModifier.calibrate_module (/p/llmcompressor/modifiers/pruning/wanda/base.py:90)": "statistics",
    "thread (7): MainThread;sparsify_weight (/p/llmcompressor/modifiers/pruning/wanda/wanda_sparsify.py:70)": "scoring",
    "thread (7): MainThread;wrap.<locals>.save_pretrained_wrapper (/p/llmcompressor/transformers/x.py:1)": "writing",
}


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def module(name: str) -> ModuleType:
        return importlib.import_module(name)

    return module


@pytest.mark.parametrize(("stack", "stage"), STACKS.items(), ids=range(len(STACKS)))
def test_every_sample_goes_to_its_stage(study, stack, stage):
    assert study("profiles").by_stage([f"{stack} 3"]) == ({stage: 3} if stage else {})


def test_samples_of_a_stage_add_up(study):
    counted = study("profiles").by_stage([f"{stack} {number}" for number, stack in enumerate(STACKS, start=1)])
    numbers = [number for number, stage in enumerate(STACKS.values(), start=1) if stage]
    assert sum(counted.values()) == sum(numbers)
    assert counted["scoring"] == 4 + 14


def test_the_memory_of_a_process_is_its_own(tmp_path):
    """A small process that follows a large one is small; that is not what RUSAGE_CHILDREN says."""
    code = f"""
import os, sys
from pathlib import Path
from processes import measured
log = Path({str(tmp_path / "log")!r})
for size in (300_000_000, 1):
    command = [sys.executable, "-c", f"x = b'x' * {{size}}"]
    print(measured(command, log=log, environment=os.environ).peak_bytes)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=BENCHMARKS, check=True)
    large, small = map(int, done.stdout.split())
    assert 300e6 < large < 400e6
    assert small < 100e6


def test_a_process_that_fails_shows_the_end_of_its_log(study, tmp_path):
    command = [sys.executable, "-c", "import sys; print('why it failed'); sys.exit(3)"]
    with pytest.raises(RuntimeError, match=r"ended with 3:\nwhy it failed"):
        study("processes").measured(command, log=tmp_path / "log", environment=os.environ)


def test_other_tokens_are_refused(study, tmp_path):
    (tmp_path / "plan").mkdir()
    provenance = [{"calibration": {"sha256": "aa"}}]
    (tmp_path / "plan" / "plan.json").write_text(json.dumps({"provenance": provenance}))
    study("checkpoints").check_tokens(tmp_path, "aa")
    with pytest.raises(RuntimeError, match="calibrated on other tokens"):
        study("checkpoints").check_tokens(tmp_path, "bb")


def test_best_compares_the_fastest_of_each_tool(study):
    timed = [
        ("secateur", "a", 10.0, 500.0),
        ("secateur", "b", 4.0, 400.0),
        ("peer", "a", 12.0, 900.0),
        ("peer", "b", 20.0, 800.0),
    ]
    rows = [
        {"method": "wanda", "tool": tool, "dtype": dtype, "seconds": seconds, "peak MB": peak}
        for tool, dtype, seconds, peak in timed
    ]
    (row,) = study("comparison").best([{"method": "dense", "tool": "", "dtype": "a"}, *rows])
    assert row["tool"] == "secateur b / peer a"
    assert row["faster"] == 3.0
    assert row["memory"] == pytest.approx(400 / 900)


def test_what_is_left_of_a_parameter_is_read_off_its_values(study):
    """Rows and columns that another library removed are found again, and other changes are told from cuts."""
    check = study("breadth_check")
    dense, cut = torch.nn.Linear(5, 4), torch.nn.Linear(3, 2)
    rows, columns = torch.tensor([0, 3]), torch.tensor([1, 2, 4])
    with torch.no_grad():
        cut.weight.copy_(dense.weight[rows][:, columns])
        cut.bias.copy_(dense.bias[rows])
    kept = check.survivors(dense, cut)
    assert [positions.tolist() for positions in kept["weight"][0]] == [[0, 3], [1, 2, 4]]
    assert [positions.tolist() for positions in kept["bias"][0]] == [[0, 3]]
    with torch.no_grad():
        cut.weight[0, 0] += 1
    assert check.survivors(dense, cut) is None


def test_another_shape_is_no_small_error(study):
    check = study("breadth_check")
    ones = torch.ones(2, 3)
    assert check.relative_error([ones], [2 * ones]) == 0.5
    assert check.relative_error([ones[:, :2]], [ones]) == check.relative_error([ones / 0], [ones]) == float("inf")


def test_expected_and_measured_latencies_are_compared(study, tmp_path, monkeypatch):
    """By a clock that counts floating-point operations, what is expected is what is measured."""

    def operations(work) -> int:
        with FlopCounterMode(display=False) as counter:
            work()
        return counter.get_total_flops()

    def take_turns(works, repeats, devices, step=None):
        return {name: [1e-9 * operations(work)] * repeats for name, work in works.items()}

    monkeypatch.setattr(timing, "take_turns", take_turns)
    latency = study("latency")
    module, x = latency.Small(width=8).eval(), torch.zeros(1, 3, 8, 8)
    (row,) = latency.compare(module, x, [0.5], round_to=1, repeats=1, table=tmp_path / "table.json")
    assert row["dense ms"] == pytest.approx(1e-6 * operations(lambda: module(x)))
    assert row["off"] == pytest.approx(0, abs=1e-6) and row["within"]
    assert row["measured"] == pytest.approx(row["MACs left"]) == pytest.approx(0.5, abs=0.1)
    assert row["expected ms"] == pytest.approx(row["measured ms"])


def test_a_cut_network_is_timed_in_both_runtimes(study, tmp_path):
    speed, module = study("speed_cnn"), study("latency").Small(width=16).eval()
    rows = speed.measure(
        module, torch.zeros(2, 3, 8, 8), sparsity=0.5, budget="macs", round_to=8, repeats=1, folder=tmp_path
    )
    assert [row["runtime"] for row in rows] == ["torch", "onnxruntime"]
    for row in rows:
        assert row["times faster"] == row["dense ms"] / row["cut ms"]
        assert row["GMACs cut"] == pytest.approx(0.5 * row["GMACs dense"], rel=0.2)
    assert rows[0]["peak MB cut"] < rows[0]["peak MB dense"]


def test_a_shuffled_mask_has_the_same_counts_in_every_layer(study):
    precropping = study("precropping")
    torch.manual_seed(0)
    setting = precropping.settings(None)[0]
    asked = precropping.Asked(setting, setting.network(), torch.randn(1, 1, 8, 8), density=0.1, seed=0)
    chosen, drawn = precropping.synflow(asked)[1], precropping.shuffled(asked)[1]
    assert {n: int(m.sum()) for n, m in chosen.items()} == {n: int(m.sum()) for n, m in drawn.items()}
    assert any(not torch.equal(chosen[name], drawn[name]) for name in chosen)
    assert sum(int(mask.sum()) for mask in chosen.values()) == round(0.1 * sum(m.numel() for m in chosen.values()))
    # and a narrower network has as many parameters as a masked one
    total = sum(p.numel() for p in asked.network.parameters())
    masked = total - sum(int((~mask).sum()) for mask in chosen.values())
    assert round((1 - asked.sparsity()) * total) == masked


def test_a_mask_shuffled_within_its_channels_uses_no_others(study):
    precropping = study("precropping")
    torch.manual_seed(0)
    setting = precropping.settings(None)[0]
    asked = precropping.Asked(setting, setting.network(), torch.randn(1, 1, 8, 8), density=0.05, seed=0)
    chosen, (network, drawn) = precropping.synflow(asked)[1], precropping.same_channels(asked)
    for name, mask in drawn.items():
        assert int(mask.sum()) == int(chosen[name].sum())
        for dim in (0, 1):
            used = mask.movedim(dim, 0).flatten(1).any(dim=1)
            assert not (used & ~chosen[name].movedim(dim, 0).flatten(1).any(dim=1)).any()
    assert any(not torch.equal(chosen[name], drawn[name]) for name in chosen)
    assert precropping.channels_used(network, {}, setting) == 100
    used = precropping.channels_used(network, chosen, setting)
    assert used < precropping.channels_used(network, precropping.shuffled(asked)[1], setting) <= 100


def test_published_rows_of_the_breadth_study_are_gone_on_from(study, monkeypatch):
    breadth = study("breadth")
    ours = {"class": "exact", "error": 1e-9, "macs fall": 0.4, "averages": "", "form": "module", "export s": 3.0}
    ours["ranking"] = "mean"
    theirs = {"class": "fails", "reason": "RuntimeError: shape '[2, 3|4]' is invalid", "ranking": "mean"}
    known = {("t", "a", "secateur"): ours, ("t", "a", "torch-pruning"): theirs, ("t", "b", "secateur"): ours}
    table = [breadth._table_row(known, "t", name) for name in "ab"]
    monkeypatch.setattr(breadth, "finished_rows", lambda name: table)
    again = breadth.published_rows()
    assert set(again) == set(known)
    assert [breadth._table_row(again, "t", name) for name in "ab"] == table
    assert breadth._seconds(again["t", "b", "secateur"]) == 6
    models = [("t", "a"), ("t", "b")]
    assert breadth.summary(again, models) == breadth.summary(known, models)


def test_the_cost_of_structure_is_taken_by_stage(study):
    cost = study("structure_cost")
    module, found = cost.secateur(cost.small())
    assert module[0][0].out_channels < 8 and cost.applying.cut_graph is secateur.structure.graphcut.cut_graph
    stages = [found[key] for key in found if key.endswith(" s")]
    assert len(stages) == 8 and min(stages) > 0 and found["trace / export"] > 1
    one = {"seconds": 1.0, "wall": 2.0, "peak MB": 5.0, "result": "runs"}
    taken = {"secateur": [{**found, **one, "seconds": s} for s in (3.0, 1.0, 2.0)], "torch-pruning": [one] * 3}
    ours, theirs = cost.rows_of("ResNet-50", taken)
    assert (ours["seconds"], ours["times Torch-Pruning"], theirs["range"]) == (2.0, 2.0, "1.00 to 1.00")


def test_networks_of_the_obspa_study_are_cut_through_their_shortcuts(study):
    obspa = study("obspa")
    torch.manual_seed(0)
    module, x = obspa.ResNet(8).eval(), torch.randn(4, 3, 16, 16)
    pixels = torch.randint(256, (8, 3, 16, 16), dtype=torch.uint8)
    images = obspa.Images(pixels, torch.arange(8))
    data = list(images.batches(4))
    assert len(data) == 2 and data[0][0].shape == x.shape and abs(float(data[0][0].mean())) < 1
    result = secateur.prune(module, example_inputs=(x,), method="obspa", sparsity=0.3, budget="macs", data=data)
    masked = secateur.apply(result.plan, module, mask=True)
    # the zeros that a shortcut adds stay, and so do the channels of the block beside them
    assert len(result.plan.keep["conv1"]) < 16 <= result.model.layer2[0].conv2.out_channels
    with torch.no_grad():
        assert torch.allclose(result.model(x), masked(x), atol=1e-4)
        right = module(torch.cat([x for x, _ in data])).argmax(1) == torch.arange(8)
    assert obspa.top1(module, images, 4) == 100 * float(right.sum()) / 8


def test_rows_of_the_obspa_study_are_means_over_seeds(study, monkeypatch):
    obspa, written = study("obspa"), []
    monkeypatch.setattr(obspa, "write_result", lambda *given: written.append(given))
    row = {"network": "n", "macs": 0.2, "method": "obspa, noise", "achieved": 0.2, "seconds": 1.0, "images": 9}
    earlier = [{"network": "n", "top-1 %": 1.0}, {"network": "another", "top-1 %": 2.0}]
    monkeypatch.setattr(obspa, "finished_rows", lambda name: earlier)
    obspa.write([{**row, "seed": s, "top1": t, "calibration": 4} for s, t in ((0, 70.0), (1, 80.0))])
    ((name, _, setting, table, _),) = written
    assert name == "obspa" and setting["seeds"] == [0, 1]
    # a network that was measured again has no rows of before
    assert [row["network"] for row in table] == ["another", "n"]
    assert table[1]["top-1 %"] == 75.0 and table[1]["over seeds"] == "70.0 to 80.0"


def test_what_is_asked_of_a_language_model_is_compared_with_what_it_takes(study, monkeypatch):
    def take_turns(works, repeats, devices, step=None):
        found = {}
        for name, work in works.items():
            with FlopCounterMode(display=False) as counter:
                work()
            found[name] = [1e-9 * counter.get_total_flops()] * repeats
        return found

    monkeypatch.setattr(timing, "take_turns", take_turns)
    budgets, model = study("budgets"), make_tiny("llama")
    asked = {name: setting for name, setting in budgets.settings(0.8, 0.5).items() if "and" in name}
    dense, cut = budgets.compare(
        model,
        None,
        asked,
        method="random_sp",
        workload="batch=1,prompt=8,new=2",
        repeats=1,
        evaluate=[],
        options={"variants": "scores"},
        windows=1,
    )
    assert cut["asked"] == 0.8 and cut["KV bytes asked"] == cut["KV bytes left"] == 0.5
    assert cut["measured"] == pytest.approx(cut["expected"], rel=0.02) and cut["within"]
    assert cut["request ms"] < dense["request ms"] and cut["parameters"] < dense["parameters"]


def test_the_front_of_second_order_methods_and_its_picture(study):
    module = study("second_order")
    rows = [
        {"kind": "weights", "removed": "0.5", "method": name, "perplexity": perplexity, "cpu seconds": seconds}
        for name, perplexity, seconds in (("wanda", 48.0, 70.0), ("slow", 50.0, 80.0), ("alps", 34.0, 200.0))
    ]
    for row in rows:
        row["front"] = "yes" if module.on_front(rows, row) else ""
    assert [row["front"] for row in rows] == ["yes", "", "yes"]
    picture = module.drawn([{"removed": "", "method": "dense", "perplexity": 25.6}, *rows])
    assert picture.count("<circle") == 3 and "weights, 0.5 removed" in picture
    # a row that is ruined takes no room from the others, and no two labels lie on each other
    ruined = {"kind": "weights", "removed": "0.5", "method": "dense targets", "perplexity": 469.0, "cpu seconds": 201.0}
    crowd = [{**rows[2], "method": f"like it {place}", "front": ""} for place in range(9)]
    picture = module.drawn([*rows, *crowd, {**ruined, "front": ""}])
    marks = [float(y) for y in re.findall(r' cx="[\d.]+" cy="([\d.]+)"', picture)]
    assert min(marks) == marks[-1] and sorted(marks)[1] - marks[-1] > module.HEIGHT / 4
    heights = sorted(float(y) for y in re.findall(r'y="([\d.]+)" text-anchor="end">(?:like|alps)', picture))
    assert len(heights) == 10 and all(b - a >= module.LINE / 2 for a, b in itertools.pairwise(heights))


def test_structured_methods_are_compared_and_go_on(study, monkeypatch, tiny_checkpoint, tmp_path):
    structured, written = study("structured"), [[]]
    monkeypatch.setattr(structured, "finished_rows", lambda name: json.loads(json.dumps(written[-1])))
    monkeypatch.setattr(structured, "write_result", lambda name, title, about, rows, said, leave_out: write(rows, said))
    monkeypatch.setattr(structured, "RESULTS", tmp_path)
    monkeypatch.setattr(structured, "TEXTS", {"samples": 2, "length": 32, "windows": 4})
    monkeypatch.setattr(structured, "TOLERANCE", 0.1)
    text, said = tmp_path / "text.txt", []
    text.write_text("the quick brown fox jumps over the lazy dog, again and again\n" * 60, encoding="utf8")
    chosen, named = tmp_path / "arc_easy.jsonl", tmp_path / "ioi.jsonl"
    item = {"question": "what does it jump over?", "choices": {"text": ["dogs", "cats"], "label": ["A", "B"]}}
    chosen.write_text("\n".join(json.dumps({**item, "answerKey": key}) for key in "AAAB"), encoding="utf8")
    named.write_text(json.dumps({"prompt": "the quick brown", "answer": "fox"}), encoding="utf8")

    def write(rows, what):
        written.append(json.loads(json.dumps(rows)))
        said.append(what)

    command = ["structured.py", "--model", str(tiny_checkpoint), "--calibration", str(text), "--evaluation", str(text)]
    for more in (
        ["--methods", "magnitude_sp,wanda_sp"],
        ["--methods", "magnitude_sp,wanda_sp,random_sp", "--seeds", "1"],
        ["--methods", "magnitude_sp,wanda_sp,random_sp", "--seeds", "2"],
        ["--methods", "magnitude_sp,wanda_sp,flap", "--heal", "norms:steps=1,batch=1,length=32"],
        ["--methods", "magnitude_sp,wanda_sp", "--items", str(chosen), "--items", str(named)],
    ):
        monkeypatch.setattr("sys.argv", [*command, *more])
        # lm-eval takes seconds for every model
        monkeypatch.setattr(structured, "SPARSITIES", (0.2,) if "--items" in more else (0.2, 0.4))
        structured.main()
    # a call writes after two methods and after every further one
    _, first, once, second, third, more, fourth = written
    assert [row["method"] for row in first] == ["dense", *["wanda_sp", "magnitude_sp"] * 2]
    assert [row["method"] for row in second] == ["dense", *["wanda_sp", "magnitude_sp", "random_sp"] * 2]
    # a random method with one more seed is made again, and the others stay
    assert [row["method"] for row in once] == [row["method"] for row in second]
    assert (once[3]["seeds"], once[3]["±"]) == (1, "") and second[3]["seeds"] == 2 and second[3]["±"] > 0
    assert second[3]["losses"][0] == once[3]["losses"][0] and second[2]["±"] == ""
    assert second[1]["M parameters"] < second[0]["M parameters"]
    # rows of the first call are those of the second, but for what the verdict says with one more method
    assert [row["losses"] for row in second[1:3]] == [row["losses"] for row in first[1:3]]
    assert len(third) == 11 and {row["recovery"] for row in third[7:]} == {"norms:steps=1,batch=1,length=32"}
    # a method that joins leaves the others as they were measured
    later = {(row["method"], row["sparsity"]): row for row in more if row["recovery"]}
    assert len(later) == 6 and all(
        later[row["method"], row["sparsity"]][key] == row[key] for row in third[7:] for key in ("losses", "seconds")
    )
    assert said[1].count("- Sparsity") == 2 and said[3].count("- With norms") == 2
    # what hasn't seen the items is made again, and is still the same
    seen = [row for row in fourth if "arc_easy" in row]
    assert [row["method"] for row in seen] == ["dense", "wanda_sp", "magnitude_sp"] and len(fourth) == 15
    assert all(row["arc_easy"] in (0.25, 0.75) and row["ioi"] in (0, 1) for row in seen)
    assert [row["losses"] for row in seen[1:]] == [row["losses"] for row in first[1:3]]
    # what is told is about what is there
    assert "names" not in said[1] and "names" in said[-1] and "BlockPruner tries" not in said[-1]
    assert "slicegpt, random_sp, adapt_pruner" in said[0] and "slicegpt, adapt_pruner" in said[3]
    assert "with them: flap, shortgpt, minitron," in said[1]
    # cut and trained in the picture, and what isn't trained in the last line
    (picture,) = tmp_path.glob("*.svg")
    panel = structured.drawn(more)
    assert panel.count("<circle") == 7 and "random_sp" in panel.rpartition('"end"')[2]
    assert picture.read_text(encoding="utf8") == structured.drawn(fourth)


def test_what_lies_beyond_a_picture_has_its_number_there(study):
    structured = study("structured")
    rows = [
        {"recovery": recovery, "sparsity": 0.2, "method": method, "perplexity": perplexity}
        for recovery, method, perplexity in (
            ("", "amp", 30.0),
            ("", "flap:heal=refit", 12.0),
            ("", "flap", 1e6),
            ("lora", "flap", 500.0),
        )
    ]
    panel = structured.drawn([{"recovery": "", "sparsity": "", "method": "dense", "perplexity": 10.0}, *rows])
    assert "1,000,000 → 500<" in panel and ">amp<" in panel and ">flap:heal=refit<" in panel
    assert panel.index(">flap<") < panel.index(">flap:heal=refit<") < panel.index(">amp<")
    # who trains on the way may be better than the dense model, and isn't drawn on its line
    better = {"recovery": "", "sparsity": 0.2, "method": "loraprune:steps=75", "perplexity": 8.0}
    panel = structured.drawn([{"recovery": "", "sparsity": "", "method": "dense", "perplexity": 10.0}, *rows, better])
    ends = [re.search(rf'x="([0-9.]+)"[^>]*>{said}', panel) for said in ("<title>loraprune", "dense<")]
    left, line = (float(found[1]) for found in ends if found is not None)
    assert left < line
    # who misses the budget says what is gone, and the corner what that means
    assert "misses" not in panel
    missed = {"sparsity": 0.2, "method": "shortgpt", "perplexity": 11.0, "removed": "0.1667", "verdict": structured.OFF}
    panel = structured.drawn(
        [{"sparsity": "", "method": "dense", "perplexity": 10.0}, *rows, {"recovery": "", **missed}]
    )
    assert ">shortgpt, 16.7%<" in panel and "grey: misses the budget<" in panel


def test_only_methods_that_are_there_are_told_of(study):
    structured = study("structured")
    told = structured._told([{"method": "dense"}, {"method": "loraprune:steps=75"}, {"method": "evopress"}])
    assert "LoRAPrune has 75 steps." in told and "LoRAPrune trains" in told and "8 generations" not in told
    told = structured._told([{"method": "dense"}, {"method": "blockpruner:tokens=512"}])
    assert "BlockPruner tries on 512 tokens." in told and "LoRAPrune" not in told


def test_who_cannot_cut_a_model_has_a_row_with_the_reason(study, tmp_path):
    structured = study("structured")
    make_tiny("gemma3").save_pretrained(tmp_path)
    rows = structured._refused(argparse.Namespace(model=str(tmp_path), heal=""), ["flap", structured.METHODS[12]])
    assert [(row["method"][:8], row["sparsity"], row["verdict"]) for row in rows] == [
        ("slicegpt", sparsity, "refused") for sparsity in structured.SPARSITIES
    ]
    assert "must stay in one basis" in rows[0]["error"]


class Clock:
    """A runtime that takes as long as it is told, round after round."""

    def __init__(self, seconds: list[float]) -> None:
        self.seconds = iter(seconds)

    def greedy(self, ids, new: int):
        taken = next(self.seconds)
        return [], taken, 2 * taken


def test_runtimes_are_compared_round_by_round(study):
    # the first round warms up; the machine is half as fast in the last one
    runtimes = {"dense": {"there": Clock([9, 4, 4, 8])}, "cut": {"there": Clock([9, 2, 2, 4])}}
    columns = study("runtimes").take_times(runtimes, prompt=[1] * 8, new=4, repeats=3)
    assert columns["cut"]["prefill there × dense"] == columns["cut"]["decode there × dense"] == 2
    assert columns["dense"]["prefill there × dense"] == 1
    assert (columns["dense"]["prefill there"], columns["dense"]["decode there"]) == (2, 0.5)


def test_what_of_a_token_is_no_product_is_taken_in_the_same_round(study, monkeypatch):
    runtimes = study("runtimes")
    taken = {"dense": [(9, 9), (4, 3), (8, 6), (2, 1.5)], "cut": [(9, 9), (2, 1), (4, 2), (1, 0.5)]}
    models = {name: runtimes.Transformers(name) for name in taken}
    rounds = {name: iter(one) for name, one in taken.items()}
    now = {}

    def greedy(self, ids, new):
        now[self.model] = next(rounds[self.model])
        return [], 1, now[self.model][0]

    monkeypatch.setattr(runtimes.Transformers, "greedy", greedy)
    monkeypatch.setattr(runtimes.Transformers, "products", lambda self, new: now[self.model][1])
    pairs = {name: {"transformers": model} for name, model in models.items()}
    columns = runtimes.take_times(pairs, prompt=[1], new=2, repeats=3)
    # of 4, 8 and 2 s 1, 2 and 0.5 s, for two tokens
    assert columns["dense"]["rest ms transformers"] == columns["cut"]["rest ms transformers"] == 500
    assert columns["cut"]["products transformers × dense"] == 3
    said = runtimes.why(columns)
    assert said == "dense: 500.0 ms of 2000.0, cut: 500.0 ms of 1000.0"


def test_memory_of_gradients_is_told_beside_what_was_wanted(study):
    module = study("gradient_memory")
    taken = dict(zip(module.ROWS, [1000, 300, 1400, 550, 1000], strict=True))
    said = module.text([{"what": what, "difference MB": size} for what, size in taken.items()])
    assert "`llm_pruner` takes 0.30 times what `training step` does, within the 1.3 that were wanted." in said
    assert "`llm_pruner, param_mix` takes 1.40 times what `training step` does, above the 1.3" in said
    assert "`loraprune` takes 0.55 times what `loraprune, true gradients` does, within the 0.6" in said
    command = module.command("loraprune, true gradients", "MODEL")
    assert command[1:5] == ["-m", "secateur", "prune", "MODEL"] and "metric=grad" in command


def test_what_studies_of_pruning_by_gradients_say(study):
    rows = [
        {"criterion": name, "healed": healed, "perplexity": value}
        for name, healed, value in (
            ("dense", False, 10.0),
            ("param_first", False, 40.0),
            ("param_first", True, 20.0),
            ("random", False, 80.0),
            ("random", False, 120.0),
        )
    ]
    said = study("llm_pruner").text(rows)
    assert "`random` has 2.50 times the perplexity of `param_first`" in said
    assert "closes 50% of the gap" in said and "vectorize" not in said
    ways = [
        {"way": way, "seed": seed, "batch": batch, "length": 8, "dtype": "float32", "perplexity": value}
        for way, seed, batch, value in (
            ("lora", 0, 1, 20.0),
            ("grad", 0, 1, 19.5),
            ("lora", 1, 1, 20.0),
            ("grad", 1, 1, 19.3),
            # of a seed that the other hasn't, and of another batch
            ("grad", 2, 1, 90.0),
            ("lora", 2, 4, 15.0),
            ("lora, rank 64", 0, 1, 16.0),
            ("grad, rank 64", 0, 1, 15.2),
        )
    ]
    said = study("loraprune").text([{"way": "dense", "seed": 0, "perplexity": 10.0}, *ways])
    assert "float32: `grad` has 0.970 (standard deviation 0.007 over 2 seeds) times the perplexity of `lora`" in said
    assert "`grad, rank 64` has 0.950 times the perplexity of `lora, rank 64`." in said and "of 4 x 8" not in said


def test_wide_adapters_tell_what_gradients_do(study, monkeypatch, tiny_checkpoint, tmp_path):
    module, found = study("loraprune_scores"), []
    monkeypatch.setattr(module, "write_result", lambda name, title, about, rows, text: found.extend(rows))
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog, again and again\n" * 60, encoding="utf8")
    options = ["--windows", "1", "--steps", "2", "--length", "16", "--ranks", "2,8192"]
    monkeypatch.setattr(
        "sys.argv", ["loraprune_scores.py", "--model", str(tiny_checkpoint), "--calibration", str(text), *options]
    )
    module.main()
    scores = {(row["scores"], row["beside"]): row for row in found}
    narrow, wide = (scores[f"lora, rank {rank}", "gradient"] for rank in (2, 8192))
    assert wide["correlation, neurons"] > 0.9 > narrow["correlation, neurons"]
    assert wide["half, neurons"] > narrow["half, neurons"]
    assert 0 <= scores["lora, rank 2", "other seed"]["half, heads"] <= 1 and len(found) == 5


def test_a_prefix_is_read_once_and_compressed_in_many_ways(study):
    kv_cache, model = study("kv_cache"), make_tiny("llama")
    ids = torch.randint(3, 96, (1, 40), generator=torch.Generator().manual_seed(0))
    window = kv_cache.Window(kv_cache.read_prompt(model, ids[:, :24]), ids[0, 24:])
    with torch.no_grad():
        logits = model(ids).logits[0, 24:-1]
    dense, report = kv_cache.measured(model, window, kv_cache.parse_cache_spec("knorm:0"))
    expected = torch.nn.functional.cross_entropy(logits, ids[0, 25:], reduction="none")
    assert torch.allclose(dense, expected, atol=1e-5) and report["bytes_held"] == report["bytes_dense"]
    labels = [label for label, _ in kv_cache.settings("all", [0.5])]
    assert len(labels) == len(set(labels)) and "snapkv:0.5" in labels and "channels by random:0.4" in labels
    for methods in (
        kv_cache.parse_cache_spec("knorm:0.5"),
        (kv_cache.RandomElements(sparsity=0.5, window=4, block=1),),
    ):
        found, report = kv_cache.measured(model, window, methods)
        assert not torch.allclose(found, dense, atol=1e-3) and report["bytes_held"] < report["bytes_dense"]
        alone = sc.compressed_cache("knorm:0.5", model)
        if len(found) and methods[0].name == "knorm":
            with torch.no_grad():
                model(ids[:, :24], cache=alone)
                logits = model(ids[:, 24:-1], cache=alone).logits[0]
            assert torch.allclose(found, torch.nn.functional.cross_entropy(logits, ids[0, 25:], reduction="none"))


def test_pictures_stand_by_themselves_and_hold_what_lies_beyond_their_edge(study):
    svg = study("svg")
    along = svg.logarithmic(10.0, 1000.0, 50.0, 250.0)
    assert [along(value) for value in (1.0, 10.0, 100.0, 1e5)] == pytest.approx([50.0, 50.0, 150.0, 250.0])
    assert svg.logarithmic(5.0, 5.0, 0.0, 1.0)(5.0) == 0.0
    parts = [svg.below(10, svg.text(1, 2, "a < b & c")), svg.dot(1, 2, "c6", '"quoted"')]
    picture = svg.document(20, 30, parts, title="1 < 2", series=7, dark=".own{fill:red}")
    page = ElementTree.fromstring(picture)
    assert page.get("viewBox") == "0 0 20 30"
    assert [text for text in page.itertext() if text.strip() and "{" not in text] == ["1 < 2", "a < b & c", '"quoted"']
    light, dark = picture.split("prefers-color-scheme: dark")
    # colours begin again behind the last, and both kinds of page have all of them
    assert all(page.count(".c0{") == page.count(".c6{") == 1 for page in (light, dark)) and ".own" not in light


def test_the_picture_and_the_table_of_the_guide_are_those_of_the_result(study):
    pictures = study("pictures")
    result = json.loads(pictures.RESULT.read_text(encoding="utf8"))
    assert pictures.PICTURE.read_text(encoding="utf8") == pictures.picture(result), "run benchmarks/pictures.py"
    guide = pictures.GUIDE.read_text(encoding="utf8")
    assert guide == pictures.with_table(guide, result), "run benchmarks/pictures.py"
    # every series has its places, and a larger loss lies higher
    places = pictures.series_of(result["rows"])
    assert all(places.values()) and [cache for _, _, cache in places["tokens by chance"]] == [
        "random_kv:0.75",
        "random_kv:0.5",
    ]
    half = {
        name: next(y for x, y, _ in found if 45 < x < 60) for name, found in places.items() if name[:7] == "tokens:"
    }
    svg = pictures.picture({"model": "m", "rows": [row for row in result["rows"] if row["cache"].endswith("kv:0.5")]})
    heights = {n: float(y) for y, n in re.findall(r'y="([\d.]+)"><title>(\w+):0.5', svg)}
    assert half["tokens: adakv"] < half["tokens: streaming_llm"] and heights["adakv"] > heights["random_kv"]
