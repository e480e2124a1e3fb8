"""Killed at any step in the file system, a command ends in the same bytes the next time, and nothing else is left."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

import secateur as sc
from killing import KILLED, in_a_child, killed_at, steps_of
from secateur.errors import OutputError
from secateur.plans import Plan
from secateur.runs import states
from secateur.runs.applying import apply_plans
from secateur.runs.folder import run_path

Job = Callable[..., object]


@pytest.fixture(scope="module")
def dense(tmp_path_factory, make_llama, tiny_tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    make_llama(num_hidden_layers=2).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    sc.plan(sc.load(folder)[0], method="magnitude", sparsity=0.5).save(folder / "its plan")
    return folder


def _prune(dense: Path, out: Path, **how: Any) -> object:
    step = {"method": "magnitude", "sparsity": 0.5}
    return sc.run({"model": str(dense), "out": str(out), "steps": [step], "dtype": "float32"}, **how)


def _apply(dense: Path, out: Path, **how: Any) -> object:
    return apply_plans([Plan.load(dense / "its plan")], dense, out, **how)


def _heal(dense: Path, out: Path, **how: Any) -> object:
    options = {"batch": 1, "length": 16, "held_out": 1}
    return sc.heal(dense, out=out, train="norms", steps=1, options=options, **how)


def _convert(dense: Path, out: Path, **how: Any) -> object:
    return sc.convert(dense, out, **how)


def _save(dense: Path, out: Path, **how: Any) -> object:
    return Plan.load(dense / "its plan").save(out, **how)


RESUMABLE: Mapping[str, Job] = {"prune": _prune, "plan apply": _apply, "heal": _heal}
REPEATED: Mapping[str, Job] = {"convert": _convert, "plan": _save}


def files(folder: Path) -> dict[str, bytes]:
    """Everything whose bytes are promised; the report, the card and so the manifest tell of times."""
    told = {"report.json", "README.md", "manifest.json"}
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in told
    }


def again(job: Job, dense: Path, out: Path, *, resume: bool, replaced: bool = False) -> None:
    """What the user does after a kill: the same command once more, with --resume where there is a run."""
    if not resume:
        job(dense, out, overwrite=True)
        return
    try:
        job(dense, out, resume=True, overwrite=replaced)
    except OutputError as error:
        # killed before there was a run, or after all was done
        assert not run_path(out).exists(), error
        if "there is nothing to resume" in str(error):
            job(dense, out, overwrite=replaced)
        else:
            assert "exists and is not empty" in str(error)


def outcome(out: Path, whole: Path) -> str:
    """What is wrong with what is there; nothing where it is as if nobody had been killed."""
    left = sorted(path.name for path in out.parent.iterdir())
    if left != [out.name]:
        return f"left: {left}"
    if files(out) != files(whole):
        return f"files: {sorted(files(out))}"
    problems = [p for f in sc.verify(out) for p in f.problems] if (out / "manifest.json").exists() else []
    return "; ".join(problems)


def try_all(job: Job, dense: Path, tmp_path: Path, *, every: int, resume: bool, replaced: bool = False) -> list[str]:
    """Kill the job at every ``every``-th step and begin again; what went wrong, by step."""
    work = tmp_path / "work"
    out, old = work / "out", tmp_path / "whole"
    if not old.exists():
        job(dense, old)

    def prepare() -> None:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        if replaced:
            shutil.copytree(dense / "its plan", out)

    prepare()
    steps = steps_of(lambda: job(dense, out, overwrite=replaced), work)
    wrong = []
    for step in chosen(steps, every):
        prepare()
        code = killed_at(step, lambda: job(dense, out, overwrite=replaced), work)
        assert code == KILLED
        if in_a_child(lambda: again(job, dense, out, resume=resume, replaced=replaced)):
            wrong.append(f"{step}: {steps[step]}: refused")
        elif found := outcome(out, old):
            wrong.append(f"{step}: {steps[step]}: {found}")
    return wrong


def chosen(steps: list[tuple[str, str]], every: int) -> list[int]:
    """All steps at which names beside the output change, and every so-manieth of the others."""
    return [
        n
        for n, (event, path) in enumerate(steps)
        if n % every == 0 or (event == "os.rename" and ".run/step" not in path) or "manifest" in path
    ]


@pytest.fixture(autouse=True)
def states_after_every_step(monkeypatch) -> None:
    monkeypatch.setattr(states, "SECONDS_BETWEEN_STATES", 0.0)


@pytest.mark.parametrize("name", RESUMABLE)
def test_killed_and_resumed(name, dense, tmp_path):
    assert try_all(RESUMABLE[name], dense, tmp_path, every=40, resume=True) == []


@pytest.mark.parametrize("name", [*RESUMABLE, *REPEATED])
def test_killed_and_begun_again(name, dense, tmp_path):
    assert try_all({**RESUMABLE, **REPEATED}[name], dense, tmp_path, every=60, resume=False) == []


@pytest.mark.slow("test_killed_and_resumed")
@pytest.mark.parametrize("replaced", [False, True], ids=["new", "replaced"])
@pytest.mark.parametrize("name", RESUMABLE)
def test_killed_at_every_step_and_resumed(name, replaced, dense, tmp_path):
    assert try_all(RESUMABLE[name], dense, tmp_path, every=1, resume=True, replaced=replaced) == []


@pytest.mark.slow("test_killed_and_begun_again")
@pytest.mark.parametrize("replaced", [False, True], ids=["new", "replaced"])
@pytest.mark.parametrize("name", [*RESUMABLE, *REPEATED])
def test_killed_at_every_step_and_begun_again(name, replaced, dense, tmp_path):
    jobs = {**RESUMABLE, **REPEATED}
    assert try_all(jobs[name], dense, tmp_path, every=1, resume=False, replaced=replaced) == []
