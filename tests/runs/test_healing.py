"""Recovery training of folders: what is written, what is told, and that a run that dies goes on to the same bytes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing import ProcessRaisedException

import process_jobs
import rank_jobs
import secateur as sc
from forking import Forked
from ranks import run_ranks
from secateur.errors import NonFiniteError, OutputError, UsageError
from secateur.loop.loop import Loop
from secateur.observe import precision
from secateur.plans import Plan
from secateur.runs import healing, pipeline, run, states
from secateur.runs.folder import Journal
from secateur.runs.signals import Stopped

DATA = {"samples": 4, "length": 32}
HOW = {"steps": 4, "options": {"batch": 2, "length": 32, "held_out": 2, "rank": 2, "lr": 1e-2, "dropout": 0.2}}


class Crash(BaseException):
    """What no handler expects; as sudden as a process can end within a test."""


@pytest.fixture(autouse=True)
def states_after_every_step(monkeypatch) -> None:
    monkeypatch.setattr(states, "SECONDS_BETWEEN_STATES", 0.0)


@pytest.fixture(scope="module")
def pruned(tiny_checkpoint, tmp_path_factory) -> dict[str, Path]:
    """A folder with other widths in every layer, one with zeros, and one that is packed."""
    folder = tmp_path_factory.mktemp("pruned")
    for name, step, more in (
        ("cut", {"method": "flap", "sparsity": 0.4}, {}),
        ("masked", {"method": "wanda", "sparsity": 0.5}, {}),
        ("packed", {"method": "magnitude", "sparsity": 0.5}, {"format": "packed"}),
    ):
        job = {"model": str(tiny_checkpoint), "out": str(folder / name), "calibration": DATA, "steps": [step], **more}
        sc.run(job, html=name == "cut")
    return {path.name: path for path in folder.iterdir()}


def same_weights(first: Path, second: Path) -> bool:
    names = sorted(path.name for path in first.glob("*.safetensors"))
    assert names == sorted(path.name for path in second.glob("*.safetensors"))
    return all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


@pytest.mark.parametrize("kind", ["cut", "masked", "packed"])
def test_what_is_saved_is_what_was_trained(kind, pruned, tiny_checkpoint, tmp_path):
    healed = sc.heal(pruned[kind], out=tmp_path / "out", teacher=tiny_checkpoint, html=True, **HOW)
    loaded, tokenizer = sc.load(tmp_path / "out")
    mine, theirs = healed.model.state_dict(), loaded.state_dict()
    assert set(mine) == set(theirs) and all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert tokenizer is not None
    before, _ = sc.load(pruned[kind])
    assert any(not torch.equal(p, before.state_dict()[name]) for name, p in theirs.items())
    plan = Plan.load(tmp_path / "out" / "plan")
    for name, mask in plan.masks.items():
        assert torch.equal(loaded.get_parameter(name) != 0, mask), name
    # the plan, the report and its page tell of it
    [record] = plan.provenance[-1].recoveries
    assert (record.train, record.options["loss"], record.options["steps"], record.teacher) == ("lora", "kl", 4, "tiny")
    assert plan.diff(Plan.load(pruned[kind] / "plan")).rows == {}
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf8"))
    [section] = report["recoveries"]
    assert len(section["losses"]) == 4 and section["measured"][0][0] == 0 and section["measured"][-1][0] == 4
    assert report["metrics"][0]["values"] == {
        "dense": section["teacher_perplexity"], "pruned": section["before"], "healed": section["after"],
    }  # fmt: skip
    assert report["method"] == plan.method and report["layers"]
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf8")
    assert "Recovery training" in page and "Quality against tokens spent" in page and "Training loss" in page
    assert "Trained afterwards" in (tmp_path / "out" / "README.md").read_text(encoding="utf8")
    findings = {finding.check: finding for finding in sc.verify(tmp_path / "out", tiny_checkpoint)}
    assert [finding.problems for finding in findings.values() if not finding.ok] == []
    assert kind == "cut" or "trained afterwards" in findings["zeros"].detail
    assert ("packed" in (tmp_path / "out" / "config.json").read_text(encoding="utf8")) == (kind == "packed")
    assert not (tmp_path / "out.run").exists()


def test_a_zero_that_was_filled_is_still_found(pruned, tmp_path):
    sc.heal(pruned["masked"], out=tmp_path / "out", **HOW)
    model, tokenizer = sc.load(tmp_path / "out")
    plan = Plan.load(tmp_path / "out" / "plan")
    name = next(iter(plan.masks))
    with torch.no_grad():
        model.get_parameter(name)[~plan.masks[name]] = 1.0
    sc.save(model, tokenizer, tmp_path / "wrong", plan=plan)
    problems = [problem for finding in sc.verify(tmp_path / "wrong") for problem in finding.problems]
    assert any("that the plan removes are not zero" in problem for problem in problems)


def test_healed_twice_and_a_folder_of_somebody_else(pruned, tiny_checkpoint, tmp_path):
    sc.heal(pruned["cut"], out=tmp_path / "once", train="norms", **HOW)
    twice = sc.heal(tmp_path / "once", out=tmp_path / "twice", **HOW)
    assert [record.train for record in twice.plans[-1].provenance[-1].recoveries] == ["norms", "lora"]
    assert [section["train"] for section in twice.report.recoveries] == ["norms", "lora"]
    plain = sc.heal(tiny_checkpoint, out=tmp_path / "plain", html=True, **HOW)
    assert plain.plans == [] and not (tmp_path / "plain" / "plan").exists()
    assert "Training report" in (tmp_path / "plain" / "report.html").read_text(encoding="utf8")
    assert "Trained from" in (tmp_path / "plain" / "README.md").read_text(encoding="utf8")


def test_what_was_measured_before_stays_beside_the_dense_model(pruned, tmp_path):
    shutil.copytree(pruned["cut"], tmp_path / "measured")
    report = json.loads((tmp_path / "measured" / "report.json").read_text(encoding="utf8"))
    size = {"name": "parameters", "unit": "parameters", "values": {"dense": 100.0, "pruned": 80.0}}
    (tmp_path / "measured" / "report.json").write_text(json.dumps({**report, "metrics": [size]}), encoding="utf8")
    # without a teacher what training gives is told of two models, of which none is dense
    sc.heal(tmp_path / "measured", out=tmp_path / "out", html=True, **HOW)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf8")
    assert "| | dense | pruned | healed | change |" in card
    assert "| parameters (parameters) | 100 | 80 |  |  |" in card
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf8")
    head = page[page.index("<h2>Before and after</h2>") :].partition("</thead>")[0]
    assert re.findall(r'<th scope="col">([^<]*)', head) == ["metric", "dense", "pruned", "change", "healed", "change"]
    sc.heal(pruned["cut"], out=tmp_path / "bare", html=True, **HOW)
    assert "pruned (dense)" not in (tmp_path / "bare" / "report.html").read_text(encoding="utf8")


# killed and stopped


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_crash_before_any_line_of_the_journal(kind, pruned, tmp_path, monkeypatch):
    how = {"train": kind, **HOW}
    whole = sc.heal(pruned["masked"], out=tmp_path / "whole", **how)
    add, crashes = Journal.add, 0
    for count in range(1, 20):
        left = [2 if count > 1 else 1]

        def dying(self: Journal, _left: list[int] = left, **entry: object) -> None:
            _left[0] -= 1
            if _left[0] == 0:
                raise Crash
            add(self, **entry)

        with monkeypatch.context() as patch:
            patch.setattr(Journal, "add", dying)
            try:
                again = sc.heal(pruned["masked"], out=tmp_path / "out", resume=count > 1, **how)
                break
            except Crash:
                crashes += 1
    assert crashes == 4
    assert same_weights(tmp_path / "out", tmp_path / "whole")
    assert (again.curve.losses, again.curve.measured) == (whole.curve.losses, whole.curve.measured)
    assert not (tmp_path / "out.run").exists()


def arguments(folder: Path, out: Path) -> list[str]:
    words = ["heal", str(folder), "--out", str(out), "--steps", "4", "--batch", "2", "--length", "32", "--no-report"]
    return [*words, "--set", "held_out=2", "--set", "dropout=0.2", "--quiet"]


def test_killed_and_interrupted_processes_go_on(pruned, cli, tmp_path):
    assert cli(*arguments(pruned["cut"], tmp_path / "whole")).code == 0
    words = arguments(pruned["cut"], tmp_path / "out")
    with Forked(words, before=process_jobs.die_in_training) as process:
        assert process.wait() == -signal.SIGKILL
    assert cli(*words).err.endswith("add --resume to go on with it, or --overwrite to begin again\n")
    other = cli(*words, "--resume", "--lr", "0.5")
    assert (other.code, "can't go on: its recovery differs in lr" in other.err) == (1, True)
    with Forked([*words, "--resume"], before=process_jobs.interrupt_training) as process:
        said = process.stderr.read()
        assert process.wait() == 130
    assert "stopping after this step; once more stops at once" in said
    hint = f"{tmp_path / 'out'}.run holds what is done: the same command with --resume goes on from there"
    assert f"stopped after step 3 of the training; {hint}" in said
    assert not (tmp_path / "out").exists()
    resumed = cli(*words, "--resume")
    assert resumed.code == 0, resumed.err
    assert same_weights(tmp_path / "out", tmp_path / "whole")


def test_pruning_and_training_in_turns_killed_in_the_middle_ends_in_the_same_bytes(tiny_checkpoint, tmp_path, cli):
    heal = "full:steps=6,batch=1,length=32,held_out=2,loss=ce,schedule=wsd"

    def words(out):
        return ["prune", tiny_checkpoint, "--method", "adapt_pruner", "--sparsity", "0.3", "--set", "steps=8",
                "--stages", "2", "--heal", heal, "--samples", "4", "--length", "32", "--no-report", "--no-estimate",
                "--no-measure", "--out", tmp_path / out]  # fmt: skip

    assert cli(*words("whole")).code == 0
    with Forked(words("out"), before=process_jobs.die_in_the_second_stage) as process:
        assert process.wait() == -signal.SIGKILL
    resumed = cli(*words("out"), "--resume")
    assert resumed.code == 0, resumed.err
    assert same_weights(tmp_path / "out", tmp_path / "whole")
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf8"))
    assert report["method"] == "adapt_pruner" and report["achieved"] == pytest.approx(0.3, abs=0.01)
    # two and four of the six steps, one after the other
    assert [len(section["losses"]) for section in report["recoveries"]] == [2, 4]
    assert [(s["options"]["done"], s["options"]["total"]) for s in report["recoveries"]] == [(0, 6), (2, 6)]


def test_the_dtype_of_the_first_sitting_stays(pruned, tmp_path, monkeypatch):
    how = {**HOW, "options": {**HOW["options"], "batch": 4, "length": 128}}

    def measured(speedup: float) -> None:
        monkeypatch.setattr(precision, "bfloat16_speedup", lambda _: speedup)

    finished = states.StateKeeper.finished

    def dying(self: states.StateKeeper, curve: Any, *rest: Any, **more: Any) -> None:
        finished(self, curve, *rest, **more)
        if curve.steps == 2:
            raise Crash

    measured(2.0)
    whole = sc.heal(pruned["cut"], out=tmp_path / "whole", **how)
    with monkeypatch.context() as patch:
        patch.setattr(states.StateKeeper, "finished", dying)
        with pytest.raises(Crash):
            sc.heal(pruned["cut"], out=tmp_path / "out", **how)
    # a machine that is busy with something else
    measured(1.0)
    assert sc.heal(pruned["cut"], out=tmp_path / "other", **how).recovered.record.options["dtype"] == "float32"
    again = sc.heal(pruned["cut"], out=tmp_path / "out", resume=True, **how)
    assert again.recovered.record.options["dtype"] == whole.recovered.record.options["dtype"] == "bfloat16"
    assert same_weights(tmp_path / "out", tmp_path / "whole")


def test_a_damaged_state_is_named(pruned, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(healing, "write_checkpoint", lambda *_, **__: (_ for _ in ()).throw(Crash()))
        with pytest.raises(Crash):
            sc.heal(pruned["cut"], out=tmp_path / "out", **HOW)
    [state] = (tmp_path / "out.run").rglob("step-0000004.safetensors")
    os.truncate(state, 100)
    with pytest.raises(OutputError, match=r"is damaged .*: remove the run and begin again"):
        sc.heal(pruned["cut"], out=tmp_path / "out", resume=True, **HOW)


def test_a_finished_training_is_kept_when_it_cannot_be_written(pruned, tmp_path):
    whole = sc.heal(pruned["masked"], out=tmp_path / "whole", **HOW)

    def in_the_way(stage: str, done: int, total: int) -> None:
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "notes.txt").touch()

    with pytest.raises(OutputError, match=r"exists.*with --resume goes on from there"):
        sc.heal(pruned["masked"], out=tmp_path / "out", progress=in_the_way, **HOW)
    shutil.rmtree(tmp_path / "out")
    again = sc.heal(pruned["masked"], out=tmp_path / "out", resume=True, **HOW)
    assert again.curve.losses == whole.curve.losses and same_weights(tmp_path / "out", tmp_path / "whole")
    assert not (tmp_path / "out.run").exists()


def test_a_text_that_has_changed_does_not_resume(pruned, tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 40, encoding="utf8")
    how = {"out": tmp_path / "out", "data": text, **HOW}
    with monkeypatch.context() as patch:
        patch.setattr(healing, "write_checkpoint", lambda *_, **__: (_ for _ in ()).throw(Crash()))
        with pytest.raises(Crash):
            sc.heal(pruned["cut"], **how)
    text.write_text("pack my box with five dozen liquor jugs\n" * 40, encoding="utf8")
    with pytest.raises(OutputError, match=r"out\.run can't go on: its text has changed since it began"):
        sc.heal(pruned["cut"], resume=True, **how)


# as part of a run


def test_a_run_trains_what_it_has_cut_and_resumes(tiny_checkpoint, tmp_path, monkeypatch):
    lora = "lora:steps=3,batch=2,length=32,held_out=2,dropout=0.2"
    steps = [
        {"method": "flap", "sparsity": 0.3, "heal": lora},
        {"method": "wanda", "sparsity": 0.5, "heal": f"refit+{lora}"},
    ]
    job = {"model": str(tiny_checkpoint), "calibration": DATA, "steps": steps, "dtype": "float32"}
    report = sc.run({**job, "out": str(tmp_path / "whole")})
    assert [section["options"]["loss"] for section in report.recoveries] == ["kl", "kl"]
    plans = [Plan.load(tmp_path / "whole" / "plan" / f"step-{n}") for n in (1, 2)]
    assert [len(plan.provenance[-1].recoveries) for plan in plans] == [1, 1]
    assert plans[1].provenance[0].options["heal"] == "refit"
    model, _ = sc.load(tmp_path / "whole")
    for name, mask in plans[1].masks.items():
        assert torch.equal(model.get_parameter(name) != 0, mask)
    assert all(finding.ok for finding in sc.verify(tmp_path / "whole"))
    # stopped in the second training
    finished, calls = states.StateKeeper.finished, [0]

    def stop(self, *arguments, **options) -> None:
        calls[0] += 1
        if calls[0] == 5:
            os.kill(os.getpid(), signal.SIGINT)
        finished(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(states.StateKeeper, "finished", stop)
        with pytest.raises(Stopped, match=r"stopped after step 2 of the training; .* --resume"):
            sc.run({**job, "out": str(tmp_path / "out")})
    sc.run({**job, "out": str(tmp_path / "out")}, resume=True)
    assert same_weights(tmp_path / "out", tmp_path / "whole")


@pytest.mark.parametrize("given", ["full:steps=2,batch=2,length=32,held_out=2", None])
def test_a_training_that_fails_leaves_what_was_pruned_for_another_one(given, tiny_checkpoint, tmp_path, monkeypatch):
    job = {"model": str(tiny_checkpoint), "calibration": DATA, "dtype": "float32", "out": str(tmp_path / "out")}

    def asked(heal: str | None) -> dict[str, Any]:
        return {**job, "steps": [{"method": "flap", "sparsity": 0.3, "heal": heal}]}

    sc.run({**asked(given), "out": str(tmp_path / "whole")})
    kept = re.escape(f"{tmp_path / 'out'}.run holds what was pruned: another heal, or none, with --resume")
    broken = asked("full:steps=4,batch=2,length=32,held_out=2,lr=1e30,clip=0")
    with pytest.raises(NonFiniteError, match=rf"after step 1: try a lower learning rate .*; {kept}"):
        sc.run(broken)
    with pytest.raises(UsageError, match=rf"no module.*nothing.*; {kept}"):
        sc.run(asked("lora:targets=nothing,steps=2,batch=2,length=32,held_out=2"), resume=True)
    assert not (tmp_path / "out").exists()

    def unexpected(*_: object, **__: object) -> None:
        raise AssertionError("pruned again")

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "decide", unexpected)
        sc.run(asked(given), resume=True)
    assert same_weights(tmp_path / "out", tmp_path / "whole")
    assert not (tmp_path / "out.run").exists()


def test_a_training_without_memory_is_one_sentence_and_may_be_a_smaller_one(
    tiny_checkpoint, tmp_path, cli, monkeypatch
):
    def words(heal: str) -> list[Any]:
        return ["prune", tiny_checkpoint, "--method", "flap", "--sparsity", "0.3", "--samples", "4", "--length", "32",
                "--no-report", "--no-estimate", "--no-measure", "--heal", heal, "--out", tmp_path / "out"]  # fmt: skip

    shape = "steps=2,length=32,held_out=2"
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_step", lambda *_: torch.empty(2**50, dtype=torch.uint8))
        failed = cli(*words(f"lora:{shape},batch=4"))
    assert (failed.code, failed.err.splitlines()[-1]) == (
        1,
        "error: out of memory: 1,125,899.9 GB more were asked for; 'secateur estimate' says what makes a run"
        f" smaller; {tmp_path / 'out'}.run holds what was pruned: another heal, or none, with --resume goes on from"
        " there",
    )
    again = cli(*words(f"lora:{shape},batch=1"), "--resume")
    assert again.code == 0, again.err
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf8"))
    assert [section["options"]["batch"] for section in report["recoveries"]] == [1]


def test_a_training_that_a_later_step_was_built_on_stays(tiny_checkpoint, tmp_path, monkeypatch):
    steps = [
        {"method": "flap", "sparsity": 0.3, "heal": "norms:steps=2,batch=2,length=32,held_out=2"},
        {"method": "wanda", "sparsity": 0.5},
    ]
    job = {"model": str(tiny_checkpoint), "calibration": DATA, "dtype": "float32", "out": str(tmp_path / "out")}
    with monkeypatch.context() as patch:
        patch.setattr(run, "document_folder", lambda *_, **__: (_ for _ in ()).throw(Crash()))
        with pytest.raises(Crash):
            sc.run({**job, "steps": steps})
    other = [{**steps[0], "heal": "norms:steps=3,batch=2,length=32,held_out=2"}, steps[1]]
    with pytest.raises(OutputError, match="can't go on: step 2 has begun behind another training of step 1"):
        sc.run({**job, "steps": other}, resume=True)
    # what was asked for in vain has changed nothing
    sc.run({**job, "steps": steps}, resume=True)
    sc.run({**job, "out": str(tmp_path / "whole"), "steps": steps})
    assert same_weights(tmp_path / "out", tmp_path / "whole")


def test_zeros_of_earlier_steps_stay_zero_in_a_training(tiny_checkpoint, tmp_path):
    full = "full:steps=2,batch=2,length=32,held_out=2,lr=0.01"
    steps = [{"method": "wanda", "sparsity": 0.5}, {"method": "flap", "sparsity": 0.3, "heal": full}]
    job = {"model": str(tiny_checkpoint), "calibration": DATA, "steps": steps, "dtype": "float32"}
    sc.run({**job, "out": str(tmp_path / "out")})
    sc.run({**job, "steps": [steps[0], {**steps[1], "heal": None}], "out": str(tmp_path / "before")})
    trained, cut = (dict(sc.load(tmp_path / name)[0].named_parameters()) for name in ("out", "before"))
    matrices = [name for name in cut if "layers" in name and cut[name].dim() == 2]
    assert all(torch.equal(trained[name] == 0, cut[name] == 0) for name in matrices)
    assert all(finding.ok for finding in sc.verify(tmp_path / "out", base=tiny_checkpoint))


def test_a_training_after_the_vocabulary_was_cut_has_its_teacher(tiny_checkpoint, tmp_path):
    trained = "full:steps=2,batch=2,length=32,held_out=2,lr=0.01"
    steps = [{"method": "vocab", "sparsity": 0.2}, {"method": "flap", "sparsity": 0.3, "heal": trained}]
    job = {"model": str(tiny_checkpoint), "calibration": DATA, "steps": steps, "dtype": "float32"}
    [of_run] = sc.run({**job, "out": str(tmp_path / "out")}).recoveries
    sc.run({**job, "steps": [steps[0], {**steps[1], "heal": None}], "out": str(tmp_path / "cut")})
    how = {"train": "full", "teacher": tiny_checkpoint, "steps": 2, "options": HOW["options"]}
    [of_folder] = sc.heal(tmp_path / "cut", out=tmp_path / "healed", **how).report.recoveries
    for recovery in (of_run, of_folder):
        assert recovery["options"]["loss"] == "kl" and 0 < recovery["teacher_perplexity"] < 1000
    assert all(finding.ok for finding in sc.verify(tmp_path / "healed", base=tiny_checkpoint))


# ranks


RANKED = {**HOW, "options": {**HOW["options"], "dropout": 0.0, "batch": 4, "micro": 1}}


@pytest.fixture(scope="module")
def ranked(pruned, tiny_checkpoint, tmp_path_factory) -> Path:
    """What two ranks made of one checkpoint in several ways, and their notes."""
    folder = tmp_path_factory.mktemp("ranked")
    run_ranks(rank_jobs.heal, 2, pruned["masked"], folder, {name: ways(tiny_checkpoint, name) for name in WAYS})
    return folder


WAYS = {
    "lora": {"train": "lora"},
    "lora fsdp": {"train": "lora", "fsdp": True},
    "full fsdp": {"train": "full", "fsdp": True, "loss": "kl+hidden*0.1", "checkpointing": True, "micro": 2},
    "norms fsdp": {"train": "norms", "fsdp": True},
}


def ways(teacher: Path, name: str) -> dict[str, Any]:
    own = dict(WAYS[name])
    how = {"train": own.pop("train"), "loss": own.pop("loss", None), "teacher": str(teacher)}
    return {**RANKED, **how, "options": {**RANKED["options"], **own}}


@pytest.mark.parametrize("name", WAYS)
def test_two_ranks_train_like_one(name, ranked, pruned, tiny_checkpoint, tmp_path):
    how = ways(tiny_checkpoint, name)
    one = sc.heal(pruned["masked"], out=tmp_path / "one", **how)
    two = json.loads((ranked / name / "report.json").read_text(encoding="utf8"))["recoveries"][0]
    assert two["losses"] == pytest.approx(one.curve.losses, rel=1e-4)
    assert [value for _, value in two["measured"]] == pytest.approx([v for _, v in one.curve.measured], rel=1e-4)
    assert two["teacher_perplexity"] == pytest.approx(one.curve.teacher, rel=1e-6)
    first, second = (sc.load(folder)[0].state_dict() for folder in (tmp_path / "one", ranked / name))
    for key, weight in first.items():
        torch.testing.assert_close(second[key], weight, rtol=1e-3, atol=1e-4)
        assert torch.equal(second[key] != 0, weight != 0)
    assert not (ranked / f"{name}.run").exists()


@pytest.mark.parametrize("name", WAYS)
def test_ranks_share_what_a_training_takes(name, ranked):
    notes = [json.loads((ranked / f"{name}-{rank}.json").read_text(encoding="utf8")) for rank in range(2)]
    # what the optimiser remembers of all ranks together: once if it is shared, and as often as there are ranks if not
    whole = notes[0]["trained"]
    assert sum(note["remembered"] for note in notes) == 2 * whole * (1 if "fsdp" in name else 2)
    assert all((note["weights"] < 0.7 * note["all weights"]) == ("fsdp" in name) for note in notes)


def test_a_sharded_training_goes_on_to_the_bit(pruned, tiny_checkpoint, tmp_path):
    chosen = {name: ways(tiny_checkpoint, name) for name in ("full fsdp", "lora fsdp")}
    run_ranks(rank_jobs.heal_in_two_sittings, 2, pruned["masked"], tmp_path, chosen)
    for name in chosen:
        assert same_weights(tmp_path / name, tmp_path / f"{name}, again")


def test_ranks_that_cannot_share_a_step_say_so_together(pruned, tmp_path):
    how = {**HOW, "options": {**HOW["options"], "batch": 3}}
    with pytest.raises(ProcessRaisedException, match="batch 3 can't be shared by 2 ranks in forwards of 1 windows"):
        run_ranks(rank_jobs.heal, 2, pruned["cut"], tmp_path, {"out": how})
    assert not any(path.name.startswith("out") for path in tmp_path.iterdir())


# mistakes


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--steps", "0"], 2, "heal: steps must lie in [1, inf), got 0 (steps of the optimiser)"),
        (["--train", "lroa"], 2, "heal: train must be one of lora, full, norms, got 'lroa'; did you mean 'lora'?"),
        (["--loss", "kl"], 2, "the loss kl compares with a dense model: name it with --teacher (teacher=)"),
        (["--set", "steps=3"], 2, "--set steps has an option of its own: give --steps"),
        (["--set", "targets=c_attn"], 2, "no module of the blocks is called 'c_attn'"),
        (
            ["--lr", "1e30", "--set", "clip=0", "--set", "warmup=0", "--set", "measure=9"],
            1,
            "or float32; nothing was written",
        ),
        (["--teacher", "nowhere/at/all"], 1, "there is no model at nowhere/at/all"),
        (["--resume"], 1, "there is nothing to resume"),
    ],
)
def test_mistakes_on_the_command_line(more, code, message, pruned, cli, tmp_path):
    run = cli(*arguments(pruned["cut"], tmp_path / "out"), *more)
    assert (run.code, run.err.count("\n"), run.out) == (code, 1, "")
    assert message in run.err
    assert list(tmp_path.iterdir()) == []


def test_what_a_training_lacks_is_said_before_anything_is_planned(pruned, cli, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    said = "error: training adapters needs peft, which is not installed: pip install 'secateur[train]'\n"
    words = ("prune", tiny_checkpoint, "--method", "flap", "--samples", 2, "--length", 16, "--out", tmp_path / "out")
    assert cli(*words, "--heal", "lora:steps=1").err == said
    # not behind an estimate of what can't be done
    loud = [word for word in arguments(pruned["cut"], tmp_path / "out") if word != "--quiet"]
    assert cli(*loud).err == said
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    missing = cli(*words, "--heal", f"lora:steps=1,data={tmp_path / 'none.txt'}")
    assert missing.err == f"error: calibration file {tmp_path / 'none.txt'} does not exist\n"
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setitem(sys.modules, "peft", None)
    # what takes nothing for granted is estimated, and other things can be trained
    assert cli("estimate", *words[1:], "--heal", "lora:steps=1").code == 0
    assert cli(*words, "--heal", "norms:steps=1,batch=1,length=16,data=builtin", "--quiet").code == 0


def test_folders_that_are_none(pruned, cli, tmp_path):
    (tmp_path / "empty").mkdir()
    run = cli(*arguments(tmp_path / "empty", tmp_path / "out"))
    assert run.code == 1 and f"{tmp_path / 'empty'} holds no model: there is no config.json in it" in run.err
    taken = shutil.copytree(tmp_path / "empty", tmp_path / "taken")
    (taken / "mine.txt").write_text("mine", encoding="utf8")
    run = cli(*arguments(pruned["cut"], taken))
    assert run.code == 1 and "exists and is not empty: choose another folder, or pass --overwrite" in run.err
    assert cli("heal", pruned["cut"]).err == "error: give a folder for the trained checkpoint with --out\n"


def test_the_command_shows_the_curve(pruned, cli, tmp_path):
    run = cli(*arguments(pruned["cut"], tmp_path / "out"))
    assert run.code == 0, run.err
    assert "held-out perplexity" in run.out and "lora, 4 steps on 256 tokens" in run.out and "load it with" in run.out
    run = cli(*arguments(pruned["cut"], tmp_path / "out"), "--overwrite", "--json")
    assert len(json.loads(run.out)["recovery"]["losses"]) == 4
    shown = cli("plan", "show", tmp_path / "out")
    assert "trained afterwards: lora, loss ce, 4 steps, 256 tokens" in " ".join(shown.out.split())
