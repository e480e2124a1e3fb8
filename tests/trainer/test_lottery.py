"""``secateur lottery``: what it leaves, in which order trainings start, and that it goes on where it stopped."""

from __future__ import annotations

import csv
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml

import secateur as sc
from secateur.rounds import Entry
from secateur.sweep.pools import InSequence
from secateur.sweep.worker import Failure
from secateur.trainer import lottery, lotteryresults
from secateur.trainer.lottery import LotteryWorker, Trial, make_job, make_lottery_recipe, open_folder, run_lottery
from secateur.trainer.networks import first_network

RECIPE: dict[str, Any] = {
    "model": {"name": "perceptron", "options": {"sizes": [64, 16, 10]}},
    "data": {"images": "sklearn:digits?split=train", "test": "sklearn:digits?limit=60"},
    "steps": 6,
    "batch": 16,
    "lottery": {"levels": 2, "seeds": [0, 1], "controls": ["reinit", "shuffle"], "rate": 0.5},
}


def recipe(**changes: Any) -> Any:
    lottery = {**RECIPE["lottery"], **changes.pop("lottery", {})}
    return make_lottery_recipe({**RECIPE, **changes, "lottery": lottery}, "the recipe")


def run(asked: Any, folder: Path, *, resume: bool = False, pool: Any = InSequence) -> lottery.Tickets:
    job = make_job(asked, folder, plugins=(), trust_remote_code=False)
    open_folder(asked, folder, resume=resume, overwrite=False)
    made = pool(job)
    try:
        return run_lottery(asked, made, LotteryWorker(job), lambda *_: None)
    finally:
        made.close()


def sequence(job: Any) -> InSequence:
    return InSequence(job, LotteryWorker)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lottery") / "whole"
    return run(recipe(), folder, pool=sequence), folder


def test_levels_seeds_and_controls_are_all_trained(whole):
    found, folder = whole
    assert {(e.seed, e.level, e.branch) for e in found.entries} == {
        (seed, level, branch)
        for seed in (0, 1)
        for level in (0, 1, 2)
        for branch in ("ticket", *(("reinit", "shuffle") if level else ()))
    }
    assert found.reused == 0 and not found.failed
    by_place = {(e.seed, e.level, e.branch): e for e in found.entries}
    assert [by_place[0, level, "ticket"].weights for level in (0, 1, 2)] == [1184, 592, 296]
    assert by_place[0, 2, "shuffle"].layers == by_place[0, 2, "ticket"].layers
    for entry in found.entries:
        assert entry.steps == 6 and 0 <= entry.metrics["accuracy"] <= 1
    # seeds draw other networks, and so do reinit and its ticket
    values = {e.metrics["loss"] for e in found.entries}
    assert len(values) == len(found.entries)
    assert (folder / "seed-0" / "level-02" / "masks.safetensors").is_file()


def test_seeds_and_levels_are_what_the_python_interface_gives(whole, tmp_path):
    found, folder = whole
    worker = LotteryWorker(make_job(recipe(), folder, plugins=(), trust_remote_code=False))
    examples = worker._open()[1]
    alone = sc.lottery(
        first_network(recipe(), worker._open()[0]),
        lambda network, run: lottery._train(network, run, recipe(), examples),
        seeds=[1],
        levels=2,
        rate=0.5,
        controls=["reinit", "shuffle"],
        folder=tmp_path / "alone",
    )
    assert sorted(alone.entries, key=str) == sorted((e for e in found.entries if e.seed == 1), key=str)


def test_what_is_left_behind(whole, tmp_path):
    found, _ = whole
    assert lotteryresults.write_results(found, tmp_path) == []
    document = json.loads((tmp_path / "results.json").read_text(encoding="utf8"))
    rows = {(row["level"], row["branch"]): row for row in document["rows"]["accuracy"]}
    mine = [e.metrics["accuracy"] for e in found.entries if (e.level, e.branch) == (2, "reinit")]
    assert rows[2, "reinit"]["mean"] == pytest.approx(sum(mine) / 2)
    assert rows[2, "reinit"]["spread"] == pytest.approx(abs(mine[0] - mine[1]) / 2**0.5)
    with (tmp_path / "results.csv").open(newline="", encoding="utf8") as file:
        lines = list(csv.DictReader(file))
    assert [float(line["accuracy"]) for line in lines] == [e.metrics["accuracy"] for e in found.entries]
    page = (tmp_path / "lottery.html").read_text(encoding="utf8")
    assert "Accuracy against remaining weights" in page and "PQ index" in page and "shuffle" in page
    header, table = lotteryresults.columns(found)
    assert header == ["level", "remaining", "weights", "ticket", "reinit", "shuffle"]
    assert table[0][1:3] == ["100.0 %", "1,184"] and table[0][4] == "–" and "±" in table[2][5]


def test_it_goes_on_behind_the_last_training_that_is_done(whole, tmp_path, monkeypatch):
    def killed(job: Any) -> Any:
        worker = LotteryWorker(job)
        done = []

        class Mortal:
            def run(self, trial: Trial) -> Any:
                if len(done) == 6:
                    raise KeyboardInterrupt
                done.append(trial)
                return worker.run(trial)

        return InSequence(job, lambda job: Mortal())

    with pytest.raises(KeyboardInterrupt):
        run(recipe(), tmp_path / "out", pool=killed)
    again = run(recipe(), tmp_path / "out", resume=True, pool=sequence)
    assert again.reused == 6 and again.entries == whole[0].entries
    assert files(tmp_path / "out") == files(whole[1])


def test_more_levels_seeds_and_controls_may_be_asked_for(whole, tmp_path):
    small = {"levels": 1, "seeds": [0], "controls": []}
    run(recipe(lottery=small), tmp_path / "out", pool=sequence)
    grown = run(recipe(), tmp_path / "out", resume=True, pool=sequence)
    assert grown.reused == 2 and grown.entries == whole[0].entries


def test_nothing_starts_before_what_it_needs_and_failures_stop_only_what_waits_for_them(tmp_path):
    started: list[Trial] = []
    finished: list[Trial] = []

    class Three:
        """As many as three at a time, which end in the other order; level 1 of seed 1 always fails."""

        def __init__(self) -> None:
            self.waiting: list[Any] = []

        @property
        def free(self) -> bool:
            return len(self.waiting) < 3

        def submit(self, task: Any) -> None:
            trial = task.point
            assert trial.level == 0 or Trial(trial.seed, trial.level - (trial.branch == "ticket")) in finished
            started.append(trial)
            self.waiting.append(task)

        def next(self) -> Any:
            task = self.waiting.pop()
            if (task.point.seed, task.point.level) == (1, 1):
                return task, Failure("its worker process died", final=False)
            finished.append(task.point)
            return task, Entry(task.point.seed, task.point.level, task.point.branch, 0.0, 1, {"accuracy": 1.0}, 1, 0.0)

        def close(self) -> None:
            return None

    found = run(recipe(), tmp_path / "out", pool=lambda job: Three())
    assert found.failed == {"seed 1, level 1, ticket": "its worker process died"}
    assert started.count(Trial(1, 1)) == 3 and len(found.notes) == 2
    assert {t for t in started if t.seed == 1} == {Trial(1, 0), Trial(1, 1)}
    assert len([e for e in found.entries if e.seed == 0]) == 7
    with pytest.raises(sc.SecateurError, match="1 training failed, the first of them seed 1, level 1, ticket"):
        lottery.check_complete(found)


def test_what_a_worker_in_another_process_is_told_is_all_it_needs(whole):
    found, folder = whole
    # as Ray sends it; Ray itself is started in tests/sweep
    job, kind, trial = pickle.loads(
        pickle.dumps((make_job(recipe(), folder, plugins=(), trust_remote_code=False), LotteryWorker, Trial(1, 2)))
    )
    assert kind(job).run(trial) == next(e for e in found.entries if (e.seed, e.level, e.branch) == (1, 2, "ticket"))
    assert job.device == "cpu" and Path(job.folder).is_absolute()


def test_tickets_of_a_pretrained_language_model(tiny_checkpoint, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("a text that says little and says it again. " * 100, encoding="utf8")
    data = {"text": str(text), "length": 16, "windows": 2}
    spec = {"levels": 1, "seeds": [0], "controls": ["shuffle"], "rate": 0.5}
    asked = {"model": str(tiny_checkpoint), "data": data, "steps": 3, "batch": 2, "lottery": spec}
    found = run(make_lottery_recipe(asked, "the recipe"), tmp_path / "out", pool=sequence)
    assert not found.failed and found.quality == "perplexity"
    assert [e.sparsity for e in found.entries] == pytest.approx([0, 0.5, 0.5], abs=1e-3)
    assert all(e.metrics["perplexity"] > 1 for e in found.entries)
    with pytest.raises(sc.SecateurError, match="draws the network anew, and this one starts pretrained"):
        make_lottery_recipe({**asked, "lottery": {**spec, "controls": ["reinit"]}}, "the recipe")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lottery": {"contrls": ["reinit"]}}, "lottery_ticket has no option 'contrls'"),
        ({"lottery": {"controls": ["reinti"]}}, "controls are .*, got 'reinti'; did you mean 'reinit'?"),
        ({"lottery": {"method": "gmp"}}, "method is one of lottery_rewind, lottery_ticket, sap, got 'gmp'"),
        ({"lottery": {"rate": 2}}, r"rate must lie in \[0, 1\), got 2"),
        ({"lottery": {"at": [3]}}, "at are levels from 1 to 2, got 3"),
        ({"lottery": {"seeds": [1, 1]}}, "seeds are different numbers"),
        ({"lottery": {"seed": 1}}, "leave seed out"),
        ({"lottery": {"method": "lottery_rewind", "start_at": "7"}}, "start_at is step 7, but a training has"),
        ({"lottery": {"method": "lottery_rewind", "start_at": 7}}, "start_at is step 7, but a training has"),
        ({"lottery": {"method": "lottery_rewind", "start_at": True}}, "start_at must be of type str, got True"),
        ({"sparsifier": "gmp"}, "leave the sparsifier out"),
        ({"track": ["wandb"]}, "track and format are for a single training"),
        ({"model": {"name": "timm:resnet18", "start": "pretrained"}}, "draws the network anew"),
        ({"btch": 3}, "unknown key 'btch'; did you mean 'batch'?"),
    ],
)
def test_bad_recipes_are_one_sentence(changes, said):
    with pytest.raises(sc.SecateurError, match=said) as caught:
        recipe(**changes)
    assert "\n" not in str(caught.value)


def test_the_command(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = {**RECIPE, "steps": 2, "lottery": {"method": "lottery_rewind", "start_at": "50%", "levels": 1}}
    Path("lottery.yaml").write_text(yaml.safe_dump(small), encoding="utf8")
    missing = cli("lottery", "lottery.yaml", "--workers", 1)
    assert missing.code == 2 and "--out" in missing.err
    Path("broken.yaml").write_text(yaml.safe_dump({**small, "model": "perceptrn"}), encoding="utf8")
    broken = cli("lottery", "broken.yaml", "--workers", 1, "--out", "out")
    assert broken.code == 2 and "did you mean 'perceptron'?" in broken.err and not Path("out").exists()
    done = cli("lottery", "lottery.yaml", "--workers", 1, "--out", "out")
    assert done.code == 0, done.err
    assert "trainings 2/2" in done.err and "lottery.html" in done.out and "80.0 %" in done.out
    refused = cli("lottery", "lottery.yaml", "--workers", 1, "--out", "out")
    assert refused.code == 1 and "holds a lottery: pass --resume" in refused.err
    again = cli("lottery", "lottery.yaml", "--workers", 1, "--out", "out", "--resume", "--json")
    assert json.loads(again.out)["reused"] == 2
    Path("lottery.yaml").write_text(yaml.safe_dump({**small, "batch": 8}), encoding="utf8")
    other = cli("lottery", "lottery.yaml", "--workers", 1, "--out", "out", "--resume")
    assert other.code == 1 and "with another batch (16 then, 8 now)" in other.err
    anew = cli("lottery", "lottery.yaml", "--workers", 1, "--out", "out", "--overwrite", "--quiet")
    assert anew.code == 0 and anew.err == ""
    Path("train.yaml").write_text(yaml.safe_dump({k: v for k, v in small.items() if k != "lottery"}), encoding="utf8")
    plain = cli("lottery", "train.yaml", "--out", "other")
    assert plain.code == 2 and "has no key 'lottery'" in plain.err
