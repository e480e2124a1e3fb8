"""A real Ray with two workers on this machine, one of which is killed half-way."""

from __future__ import annotations

import os

import pytest

from secateur.errors import UsageError
from secateur.sweep.pools import RayPool

pytest.importorskip("ray")


def test_a_killed_worker_loses_no_point(sweep_of, run_in, faulty, tmp_path):
    plugin = faulty("os.kill(os.getpid(), 9)")
    sweep = sweep_of({"method": ["faulty", "wanda", "flap"], "sparsity": [0.3, 0.5], "seed": [0, 1]})
    results = run_in(sweep, pool=lambda job: RayPool(job, 2), plugins=(plugin,))
    assert [r.name for r in results.points] == [p.name for p in sweep.points]
    assert all(r.done for r in results.points)
    # the process that died was replaced, and none was this one
    workers = {r.worker for r in results.points} | {results.dense.worker}
    assert len(workers) >= 2 and os.getpid() not in workers
    attempts = {r.name: r.attempts for r in results.points}
    assert sorted(attempts.values()) == [1] * 11 + [2]
    assert next(name for name, times in attempts.items() if times == 2).startswith("faulty-sparsity=0.5")
    assert len(results.notes) == 1 and "its worker process died" in results.notes[0]
    assert all((tmp_path / "out" / "plans" / name / "plan.json").is_file() for name in attempts)


def test_a_cluster_that_does_not_answer_is_one_sentence(sweep_of, tmp_path, monkeypatch):
    from secateur.sweep.runner import make_job

    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "1")
    job = make_job(sweep_of({"method": "magnitude"}), tmp_path, trust_remote_code=False, plugins=())
    with pytest.raises(UsageError, match="no Ray cluster answers at not-an-address") as caught:
        RayPool(job, 1, "not-an-address")
    assert "\n" not in str(caught.value)
