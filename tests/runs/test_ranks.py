"""Two gloo ranks against one process: the same plan, half of the forwards each, and nobody is left waiting."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing import ProcessRaisedException

import rank_jobs
import secateur as sc
from ranks import run_ranks
from secateur.allocate.masks import PerMatrix, PerRow
from secateur.errors import UsageError
from secateur.methods import WeightMethod
from secateur.methods.weights.sparsegpt import SparseGPT
from secateur.plans import Plan
from secateur.ranks import Ranks, join, started_as_main

LAYERS, SAMPLES, LENGTH = 3, 8, 512
# batches of 2048 tokens hold this many windows
BATCH = 2048 // LENGTH
# scores that differ by less may swap their places when sums are taken in another order
CLOSE = 1e-5
METHODS = {"wanda": 0.5, "flap": 0.3, "sparsegpt": 0.5, "shortgpt": 0.4, "llm_pruner": 0.3}
_STAGES = {"target": "stream", "options": {"true_sequential": True}}
REFITS = {
    # decided on the dense model, then refitted to what that gives: two walks, the second one with two streams
    "refit": {"method": "flap", "sparsity": 0.3, "heal": "refit", "target": "dense"},
    # magnitude's masks don't depend on the data, so that all values can be compared
    "matrix by matrix": {"method": "magnitude", "sparsity": 0.5, "heal": "refit", **_STAGES},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, make_llama, tiny_tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    make_llama(max_position_embeddings=1024, num_hidden_layers=LAYERS).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def recipe(model: Path, method: str, out: Path, samples: int = SAMPLES, length: int = LENGTH) -> dict[str, Any]:
    return {
        "model": str(model),
        "calibration": {"samples": samples, "length": length},
        "steps": [REFITS.get(method) or {"method": method, "sparsity": METHODS[method]}],
        "dtype": "float32",
        "out": str(out),
    }


@pytest.fixture(scope="module")
def two_ranks(checkpoint, tmp_path_factory) -> Path:
    """A folder with what two ranks made by every method, and their notes."""
    out = tmp_path_factory.mktemp("two")
    run_ranks(rank_jobs.prune, 2, {m: recipe(checkpoint, m, out / m) for m in (*METHODS, *REFITS)}, out)
    return out


@dataclass(frozen=True)
class One:
    """What one process makes of a method: its folder, the windows of its calls, and the scores that its rules saw."""

    folder: Path
    windows: list[int]
    scores: dict[str, Tensor]
    achieved: float


@pytest.fixture(scope="module")
def one_process(checkpoint, tmp_path_factory) -> dict[str, One]:
    made = {}
    for method in METHODS:
        out = tmp_path_factory.mktemp("one") / "out"
        with rank_jobs.counted_windows() as calls, scored() as scores:
            report = sc.run(recipe(checkpoint, method, out))
        made[method] = One(out, calls, scores, report.achieved)
    return made


@contextmanager
def scored() -> Iterator[dict[str, Tensor]]:
    """The scores that rules see while this process prunes: rows that compete within themselves, by matrix."""
    found: dict[str, Tensor] = {}
    current: list[str] = []

    def named(real):
        def prune(self, target, seen):
            current[:] = [f"{target.name}.weight"]
            return real(self, target, seen)

        return prune

    def noted(real, rows):
        def keep(self, scores):
            # every weight of the model is narrower than SparseGPT's blocks, so that there is one call a matrix
            found[current[0]] = rows(scores).clone()
            return real(self, scores)

        return keep

    with pytest.MonkeyPatch.context() as patch:
        for method in (WeightMethod, SparseGPT):
            patch.setattr(method, "prune", named(method.prune))
        patch.setattr(PerRow, "keep", noted(PerRow.keep, lambda scores: scores))
        patch.setattr(PerMatrix, "keep", noted(PerMatrix.keep, lambda scores: scores.reshape(1, -1)))
        yield found


def plan_of(folder: Path) -> Plan:
    return Plan.load(folder / "plan")


@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_do_half_of_the_forwards_each_and_report_the_same(method, one_process, two_ranks):
    one = one_process[method]
    notes = [json.loads((two_ranks / f"{method}-{rank}.json").read_text()) for rank in range(2)]
    # a sequential method runs every block twice, the last one once; gradients come back through all that were run
    twice = {"wanda": 2 * LAYERS - 1, "sparsegpt": 2 * LAYERS - 1, "llm_pruner": 2 * LAYERS}
    passes = twice.get(method, LAYERS)
    assert sum(one.windows) == passes * SAMPLES
    assert [note["windows"] for note in notes] == [passes * SAMPLES // 2] * 2
    assert [note["largest"] for note in notes] == [BATCH] * 2 == [max(one.windows)] * 2
    assert [note["achieved"] for note in notes] == [one.achieved] * 2
    assert one.achieved > 0.1
    assert sorted(p.name for p in two_ranks.glob(f"{method}*")) == [method, f"{method}-0.json", f"{method}-1.json"]


def near_the_edge(scores_RI: Tensor, kept_RI: Tensor) -> Tensor:
    """The entries that are as good as tied with the worst that stays, or the best that goes, of their row."""
    worst = scores_RI.masked_fill(~kept_RI, torch.inf).amin(dim=1, keepdim=True)
    best = scores_RI.masked_fill(kept_RI, -torch.inf).amax(dim=1, keepdim=True)
    return torch.stack([(scores_RI - edge).abs() <= CLOSE * scores_RI.abs() for edge in (worst, best)]).any(dim=0)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_masks_differ_only_where_scores_are_as_good_as_tied(method, one_process, two_ranks):
    scored = one_process[method].scores
    one, two = plan_of(one_process[method].folder), plan_of(two_ranks / method)
    assert set(one.masks) == set(two.masks) == set(scored) and len(scored) == 7 * LAYERS
    for name, mask in one.masks.items():
        scores_RI = scored[name]
        kept_RI, other_RI = (m.reshape(scores_RI.shape) for m in (mask, two.masks[name]))
        assert kept_RI.float().mean() == 0.5 and not bool((kept_RI == kept_RI[:1, :1]).all())
        assert bool(near_the_edge(scores_RI, kept_RI)[kept_RI != other_RI].all()), name
        if name in one.values and torch.equal(mask, two.masks[name]):
            torch.testing.assert_close(one.values[name], two.values[name], rtol=1e-3, atol=1e-5)
    assert bool(one.values) == (method == "sparsegpt")


def test_units_differ_only_where_scores_are_as_good_as_tied(one_process, two_ranks):
    one, two = plan_of(one_process["flap"].folder), plan_of(two_ranks / "flap")
    gone = {name: units - len(one.keep[name]) for name, units in one.groups.items()}
    assert sum(gone.values()) > 20 and len(set(gone.values())) > 2
    kept = [torch.cat([_flags(plan, name) for name in one.groups]) for plan in (one, two)]
    scores = torch.cat([one.scores[name] for name in one.groups])
    moved = scores[kept[0] != kept[1]]
    assert len(moved) == 0 or bool((moved.max() - moved.min()) <= CLOSE * moved.abs().max())
    for name in one.groups:
        torch.testing.assert_close(one.scores[name], two.scores[name], rtol=CLOSE, atol=CLOSE)
    assert one.biases and set(one.biases) == set(two.biases)
    for name, bias in one.biases.items():
        torch.testing.assert_close(bias, two.biases[name], rtol=1e-4, atol=1e-6)


def test_gradients_of_two_ranks_are_those_of_one_process(one_process, two_ranks):
    one, two = plan_of(one_process["llm_pruner"].folder), plan_of(two_ranks / "llm_pruner")
    for name, scores in one.scores.items():
        torch.testing.assert_close(scores, two.scores[name], rtol=1e-4, atol=1e-7)
    assert len({float(scores.sum()) for scores in one.scores.values()}) == 2 * LAYERS


@pytest.mark.parametrize("case", REFITS)
def test_two_ranks_refit_as_one_process_does(case, checkpoint, two_ranks, tmp_path):
    sc.run(recipe(checkpoint, case, tmp_path / "out"))
    one, two = plan_of(tmp_path / "out"), plan_of(two_ranks / case)
    assert one.values and set(one.values) == set(two.values)
    same = [name for name, mask in one.masks.items() if torch.equal(mask, two.masks[name])]
    assert len(same) == len(one.masks) if case == "matrix by matrix" else same
    for name in same:
        torch.testing.assert_close(one.values[name], two.values[name], rtol=1e-3, atol=1e-4)


def _flags(plan: Plan, name: str) -> Tensor:
    flags = torch.zeros(plan.groups[name], dtype=torch.bool)
    flags[plan.keep[name]] = True
    return flags


def test_half_of_the_windows_alone_gives_another_plan(checkpoint, two_ranks, tmp_path):
    # otherwise the comparisons above would hold for ranks that don't merge at all
    for method in ("wanda", "sparsegpt", "flap"):
        sc.run(recipe(checkpoint, method, tmp_path / method, samples=SAMPLES // 2))
        half, both = plan_of(tmp_path / method), plan_of(two_ranks / method)
        if method == "flap":
            assert not torch.allclose(half.scores["layers.1.mlp"], both.scores["layers.1.mlp"], rtol=1e-3)
        else:
            assert sum(int((half.masks[n] != m).sum()) for n, m in both.masks.items()) > 20


def test_statistics_merge_in_the_order_of_the_ranks_and_errors_reach_all(tmp_path):
    run_ranks(rank_jobs.merge, 2, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    x_BTC = torch.load(tmp_path / "x.pt")
    for name, kind in rank_jobs.STATISTICS.items():
        whole = kind()
        whole.update(x_BTC)
        assert set(whole.state()) == set(first[name])
        for key, expected in whole.state().items():
            assert torch.equal(first[name][key], second[name][key])
            torch.testing.assert_close(first[name][key], expected, rtol=1e-5, atol=1e-6)


def test_a_run_that_fails_on_one_rank_fails_on_both_and_can_go_on(checkpoint, tmp_path):
    jobs = {where: recipe(checkpoint, "wanda", tmp_path / where / "out", length=64) for where in ("nan", "disk", "bug")}
    run_ranks(rank_jobs.fail_in_runs, 2, jobs)
    for where in jobs:
        assert [p.name for p in (tmp_path / where).iterdir()] == ["out"]
        assert (tmp_path / where / "out" / "model.safetensors").is_file()


def test_a_stopped_run_goes_on_with_as_many_ranks_and_gives_the_same_bytes(checkpoint, tmp_path):
    for name in ("stopped", "whole"):
        (tmp_path / name).mkdir()
    # hidden states in files, which the ranks must not share
    spilled = {"activation_memory": "1KB"}
    jobs = {
        name: {**recipe(checkpoint, "sparsegpt", tmp_path / name / "out", length=64), **spilled}
        for name in ("stopped", "whole")
    }
    run_ranks(rank_jobs.stop_by_signal, 2, jobs["stopped"])
    run_ranks(rank_jobs.prune, 2, {"whole": jobs["whole"]}, tmp_path)
    for file in ("model.safetensors", "plan/plan.json", "plan/plan.safetensors"):
        stopped, whole = ((tmp_path / name / "out" / file).read_bytes() for name in ("stopped", "whole"))
        assert stopped == whole, file


def test_statistics_that_ranks_keep_serve_one_process_too(checkpoint, tmp_path):
    kept = tmp_path / "statistics"
    job = recipe(checkpoint, "flap", tmp_path / "two", length=64)
    run_ranks(rank_jobs.prune, 2, {"first": job, "second": {**job, "out": str(tmp_path / "two-again")}}, tmp_path, kept)
    notes = [tmp_path / f"{name}-{rank}.json" for name in ("first", "second") for rank in range(2)]
    windows = [json.loads(note.read_text())["windows"] for note in notes]
    assert windows == [LAYERS * SAMPLES // 2] * 2 + [0] * 2
    with rank_jobs.counted_windows() as calls:
        sc.run({**job, "out": str(tmp_path / "one")}, statistics=kept)
    assert calls == [] and len(list(kept.glob("*/*.safetensors"))) == LAYERS
    for name in ("two-again", "one"):
        for file in ("model.safetensors", "plan/plan.safetensors"):
            assert (tmp_path / name / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_what_ranks_can_not_do_is_refused_on_all_of_them(checkpoint, tmp_path):
    run_ranks(rank_jobs.too_few, 2, recipe(checkpoint, "wanda", tmp_path / "out"))


TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
# --multi_gpu means several processes; which device they take is ours to say
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]


def torchrun(
    *arguments: object, script: str | None = None, launcher: Sequence[str] = TORCHRUN
) -> subprocess.CompletedProcess[str]:
    """``torchrun -m secateur …`` on two ranks; ``script`` is run in its place and starts the command by itself."""
    package = str(Path(sc.__file__).parents[1])
    path = os.pathsep.join([package, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    what = [script] if script else ["-m", "secateur"]
    command = [str(word) for word in [sys.executable, "-m", *launcher, *what, *arguments]]
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def said_by(rank: int, stream: str, logs: Path) -> str:
    """What one rank wrote, which the launcher keeps apart."""
    (file,) = logs.glob(f"**/{rank}/{stream}.log")
    return file.read_text(encoding="utf8")


@pytest.mark.parametrize(
    ("launcher", "kept"),
    [(TORCHRUN, ["--tee", "3", "--log-dir"]), (ACCELERATE, ["--tee", "3", "--log_dir"])],
    ids=["torchrun", "accelerate"],
)
def test_both_launchers_work_and_one_rank_speaks(launcher, kept, checkpoint, tmp_path):
    logs = tmp_path / "logs"
    options = ["--method", "wanda", "--sparsity", 0.5, "--samples", 6, "--length", 64, "--no-report", "--json"]
    command = ["prune", checkpoint, *options, "--out", tmp_path / "out"]
    done = torchrun(*command, launcher=[*launcher, *kept, str(logs)])
    assert done.returncode == 0, done.stderr
    assert json.loads(said_by(0, "stdout", logs))["method"] == "wanda"
    # a slow machine is told of the blocks between as well
    lines = [line.partition(",")[0] for line in said_by(0, "stderr", logs).splitlines()]
    said = [line for line in lines if line.startswith("prune ")]
    assert said == sorted(set(said)) and said[-1] == "prune 3/3"
    assert lines[0].startswith("estimate: ") and lines[0].endswith(" of memory in each of 2 ranks")
    assert said_by(1, "stdout", logs) == said_by(1, "stderr", logs) == ""
    assert plan_of(tmp_path / "out").masks


def test_a_mistake_is_one_sentence_of_one_rank(checkpoint, tmp_path):
    mistakes = {
        ("--samples", "1"): "error: 2 ranks need a calibration window each, there are 1",
        ("--dry-run",): "error: --dry-run is for one process, and here are 2",
        ("--bogus",): "error: no such option: --bogus",
    }
    command = ["prune", str(checkpoint), "--method", "wanda", "--length", "64", "--out", str(tmp_path / "out")]
    run_ranks(rank_jobs.say, 2, [[*command, *mistake] for mistake in mistakes], tmp_path)
    first, second = (json.loads((tmp_path / f"said-{rank}.json").read_text()) for rank in range(2))
    for said, message in zip(first, mistakes.values(), strict=True):
        lines = said["err"].splitlines()
        assert said["code"] in (1, 2) and said["out"] == ""
        assert lines[-1].startswith(message) and not any("error" in line for line in lines[:-1])
    assert second == [{"code": said["code"], "out": "", "err": ""} for said in first]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["said-0.json", "said-1.json"]


SLOW = """
import os, sys, time
time.sleep(3 * (os.environ["RANK"] == "0"))
from secateur.cli import main
main(sys.argv[1:])
"""


def test_the_rank_that_says_why_may_be_the_last_to_know(checkpoint, tmp_path):
    script = tmp_path / "slow.py"
    script.write_text(SLOW, encoding="utf8")
    done = torchrun("prune", checkpoint, "--bogus", "--out", tmp_path / "out", script=str(script))
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("error: no such option: --bogus") == 1, done.stderr
    assert sum(line.startswith("error:") for line in done.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["slow.py"]


KILLED = """
import os, signal, sys
from secateur.cli import main
from secateur.runs.folder import DiskKeeper

keep = DiskKeeper.keep

def dying(self, layer, *args, **kwargs):
    if layer == 1 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    keep(self, layer, *args, **kwargs)

DiskKeeper.keep = dying
main(sys.argv[1:])
"""


def test_a_rank_that_is_killed_ends_the_run_which_goes_on_later(checkpoint, tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED, encoding="utf8")
    options = ["--method", "wanda", "--samples", 6, "--length", 64, "--no-report", "--no-measure"]
    command = ["prune", checkpoint, *options, "--out", tmp_path / "out"]
    done = torchrun(*command, script=str(script))
    assert done.returncode == 1
    assert "--resume goes on from there" in done.stderr, done.stderr
    assert not (tmp_path / "out").exists() and (tmp_path / "out.run").is_dir()
    script.unlink()
    run_ranks(rank_jobs.say, 2, [[*map(str, command), "--resume"]], tmp_path)
    again = json.loads((tmp_path / "said-0.json").read_text())
    assert [said["code"] for said in again] == [0], again
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "said-0.json", "said-1.json"]


def test_one_process_is_alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    alone, ids = join(), torch.zeros(3, 2)
    assert type(alone) is Ranks and alone.main and alone.size == 1
    assert alone.part(ids) is ids and alone.device("cuda:1") == "cuda:1"
    assert alone.any(True) and not alone.any(False) and alone.on_main(lambda: 3) == 3
    with pytest.raises(ValueError, match="as it is"), alone.together():
        raise ValueError("as it is")
    assert started_as_main()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "0", "WORLD_SIZE": "many"}, "WORLD_SIZE in the environment must be a number, got 'many'"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "MASTER_ADDR is missing in the environment of rank 1"),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, "RANK 2 is not below WORLD_SIZE 2"),
    ],
)
def test_a_half_set_environment_is_refused(environment, message, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=message):
        join()
    assert started_as_main() == (environment["RANK"] == "0")


def test_ranks_allocate_by_what_all_of_them_saw(checkpoint, tmp_path):
    def asked(allocate: str, out: Path) -> dict[str, Any]:
        job = recipe(checkpoint, "wanda", out)
        job["steps"][0]["allocate"] = allocate
        return job

    # magnitudes of the scores of all matrices, and angles of blocks
    names = ("owl:m=2", "cfsp:alpha=100")
    run_ranks(
        rank_jobs.prune, 2, {f"two-{i}": asked(name, tmp_path / f"two-{i}") for i, name in enumerate(names)}, tmp_path
    )
    for i, name in enumerate(names):
        sc.run(asked(name, tmp_path / f"one-{i}"))
        one, two = (plan_of(tmp_path / f"{who}-{i}").provenance[0].allocation for who in ("one", "two"))
        assert len(set(one.sparsities.values())) > 2
        assert two.sparsities == pytest.approx(one.sparsities, abs=1 / 32 + 1e-9)
    with pytest.raises(ProcessRaisedException, match=r"UsageError: allocator search .* in one process: leave torchrun"):
        run_ranks(rank_jobs.prune, 2, {"search": asked("search", tmp_path / "search")}, tmp_path)
