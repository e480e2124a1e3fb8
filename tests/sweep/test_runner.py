"""Running a sweep: every point is there, once; what fails is tried again; what was done stays done."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch

from secateur.errors import OutputError, UsageError
from secateur.plans import Plan
from secateur.sweep import worker
from secateur.sweep.pools import InSequence
from secateur.sweep.records import DENSE, Journal, Record
from secateur.sweep.results import results_csv
from secateur.sweep.runner import make_job, open_journal
from secateur.sweep.sources import objectives, statistics_of
from secateur.sweep.worker import Failure

GRID = {"method": ["magnitude", "wanda"], "sparsity": [0.3, 0.5], "seed": [0, 1]}


def journal_records(folder):
    """All lines of a journal but the first, failures included."""
    lines = Journal(folder, {}).path.read_text(encoding="utf8").splitlines()[1:]
    return [Record.from_dict(json.loads(line)) for line in lines]


@pytest.fixture
def runs(monkeypatch):
    """How often every point was run by a worker, by name."""
    counted = Counter()
    run = worker.Worker.run

    def counting(self, point):
        counted[point.name if point else DENSE] += 1
        return run(self, point)

    monkeypatch.setattr(worker.Worker, "run", counting)
    return counted


def test_all_points_of_a_grid_with_their_plans(sweep_of, run_in, runs, tmp_path):
    sweep = sweep_of(GRID)
    results = run_in(sweep)
    assert [r.name for r in results.points] == [p.name for p in sweep.points]
    assert all(r.done and r.attempts == 1 for r in results.points)
    assert set(runs.values()) == {1} and runs[DENSE] == 1
    for record in results.points:
        plan = Plan.load(tmp_path / "out" / "plans" / record.name)
        assert plan.method == record.values["method"]
        assert plan.provenance[0].options["sparsity"] == record.values["sparsity"]
        assert record.removed == pytest.approx(record.values["sparsity"], abs=0.02)
    assert results.dense and results.dense.metric("perplexity:builtin")
    # magnitude reads no data: the seed changes nothing
    by_name = {r.name: r.metric("perplexity:builtin") for r in results.points}
    assert by_name["magnitude-sparsity=0.3-seed=0"] == by_name["magnitude-sparsity=0.3-seed=1"]
    assert by_name["magnitude-sparsity=0.3-seed=0"] != by_name["magnitude-sparsity=0.5-seed=0"]


def test_a_point_is_what_prune_and_evaluate_give(sweep_of, run_in, tiny_checkpoint):
    from secateur import api

    (point,) = run_in(sweep_of({"method": "flap", "sparsity": 0.3, "seed": 3})).points
    model, tokenizer = api.load(tiny_checkpoint, dtype="auto")
    result = api.prune(model, tokenizer, method="flap", sparsity=0.3, seed=3, samples=2, length=32)
    table = api.evaluate({"x": result.model}, tokenizer, ["perplexity:builtin", "size"], length=32, windows=2)
    assert point.metric("perplexity:builtin") == table["perplexity"].values["x"]
    assert point.metric("parameters") == table["parameters"].values["x"]
    assert point.removed == result.report.achieved


def test_the_model_is_loaded_once_and_left_as_it_is(sweep_of, run_in, monkeypatch):
    from secateur import api

    loaded = []
    load = api.load

    def counting(*arguments, **options):
        loaded.append(load(*arguments, **options))
        return loaded[-1]

    monkeypatch.setattr(api, "load", counting)
    run_in(sweep_of({"method": ["wanda", "flap"], "sparsity": 0.5}))
    ((model, _),) = loaded
    assert all((parameter != 0).float().mean() > 0.99 for parameter in model.parameters())


def test_steps_follow_each_other(sweep_of, run_in, tmp_path):
    steps = [{"method": "magnitude_sp", "sparsity": 0.2}, {"method": "magnitude"}]
    (point,) = run_in(sweep_of({"steps.2.sparsity": 0.5}, steps=steps)).points
    folder = tmp_path / "out" / "plans" / point.name
    assert [Plan.load(folder / step).method for step in ("step-1", "step-2")] == ["magnitude_sp", "magnitude"]
    assert point.removed > 0.5


def test_zeros_of_several_masks_are_counted(sweep_of, run_in, tiny_checkpoint, tmp_path):
    import secateur as sc

    steps = [{"method": "magnitude", "sparsity": 0.5}, {"method": "random"}]
    (point,) = run_in(sweep_of({"steps.2.sparsity": 0.5}, steps=steps)).points
    steps[1]["sparsity"] = 0.5
    found = sc.run({"model": str(tiny_checkpoint), "out": str(tmp_path / "single"), "steps": steps})
    assert point.removed == pytest.approx(found.achieved, abs=1e-9) and point.removed > 0.7


def test_a_failing_point_is_tried_again(sweep_of, run_in, faulty, runs):
    faulty("raise RuntimeError('out of luck')")
    results = run_in(sweep_of({"method": "faulty", "sparsity": [0.3, 0.5, 0.6]}))
    assert [(r.done, r.attempts) for r in results.points] == [(True, 1), (True, 2), (True, 1)]
    assert results.notes == ["faulty-sparsity=0.5 is tried again: RuntimeError: out of luck"]
    assert runs["faulty-sparsity=0.5"] == 2


def test_a_point_that_fails_for_good_does_not_lose_the_others(sweep_of, run_in, faulty, tmp_path):
    faulty("raise RuntimeError('never')", times=99)
    results = run_in(sweep_of({"method": "faulty", "sparsity": [0.3, 0.5, 0.6]}, retries=1))
    assert [(r.done, r.attempts, r.error) for r in results.points] == [
        (True, 1, ""),
        (False, 2, "RuntimeError: never"),
        (True, 1, ""),
    ]
    assert [r.name for r in results.failed] == ["faulty-sparsity=0.5"]
    assert not (tmp_path / "out" / "plans" / "faulty-sparsity=0.5").exists()


def test_a_mistake_that_would_come_again_is_not_tried_again(sweep_of, run_in, runs):
    results = run_in(sweep_of({"method": "wanda", "pattern": ["2:4", "2:7"]}))
    assert [(r.done, r.attempts) for r in results.points] == [(True, 1), (False, 1)]
    assert "multiple of 7" in results.points[1].error
    assert runs["wanda-pattern=2_7"] == 1


def test_failed_points_are_tried_again_on_resume(sweep_of, run_in, faulty, runs):
    faulty("raise RuntimeError('luck')", times=1)
    sweep = sweep_of({"method": "faulty", "sparsity": [0.3, 0.5]}, retries=0)
    assert not run_in(sweep).points[1].done
    results = run_in(sweep, resume=True)
    assert all(r.done for r in results.points) and results.reused == 1
    assert runs == {DENSE: 1, "faulty-sparsity=0.3": 1, "faulty-sparsity=0.5": 2}


def test_a_killed_sweep_goes_on_where_it_was(sweep_of, run_in, runs, monkeypatch, tmp_path):
    sweep = sweep_of(GRID)
    whole = run_in(sweep)
    expected = {r.name: (r.metrics, r.removed) for r in whole.points}
    (tmp_path / "out").rename(tmp_path / "whole")
    runs.clear()

    counting = worker.Worker.run

    def killed(self, point):
        if sum(runs.values()) == 4:
            raise KeyboardInterrupt
        return counting(self, point)

    monkeypatch.setattr(worker.Worker, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        run_in(sweep)
    assert len(journal_records(tmp_path / "out")) == 4
    with Journal(tmp_path / "out", {}).path.open("a") as file:
        file.write('{"name": "torn li')
    monkeypatch.setattr(worker.Worker, "run", counting)
    results = run_in(sweep, resume=True)
    assert {r.name: (r.metrics, r.removed) for r in results.points} == expected
    assert set(runs.values()) == {1} and len(runs) == 9 and results.reused == 3
    # and once more, with nothing left to do
    assert run_in(sweep, resume=True).reused == 8 and set(runs.values()) == {1}
    assert len(journal_records(tmp_path / "out")) == 9
    for name in expected:
        files = [tmp_path / folder / "plans" / name / "plan.safetensors" for folder in ("whole", "out")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_a_grid_may_grow(sweep_of, run_in, runs):
    run_in(sweep_of({"method": "magnitude", "sparsity": [0.3, 0.5]}))
    results = run_in(sweep_of({"method": "magnitude", "sparsity": [0.5, 0.6]}), resume=True)
    assert [r.values["sparsity"] for r in results.points] == [0.5, 0.6]
    assert set(runs.values()) == {1} and len(runs) == 4


def test_a_grid_may_grow_by_an_axis(sweep_of, run_in, runs):
    run_in(sweep_of({"method": "magnitude", "sparsity": [0.3]}))
    results = run_in(sweep_of({"method": "magnitude", "steps.1.sparsity": [0.3], "seed": [0, 1]}), resume=True)
    assert set(runs.values()) == {1} and len(runs) == 3
    # the point of seed 0 is the one of before, which had no seed among its axes
    assert [r.values["seed"] for r in results.points] == [0, 1]
    assert [line.split(",")[2:4] for line in results_csv(results).splitlines()[2:]] == [["0.3", "0"], ["0.3", "1"]]


def test_a_point_whose_plan_another_sweep_replaced_is_done_again(sweep_of, run_in, runs, tmp_path):
    grid = {"method": "wanda", "sparsity": [0.3, 0.5]}
    few, more = (sweep_of(grid, calibration={"samples": samples, "length": 32}) for samples in (2, 4))
    place = tmp_path / "out" / "plans" / "wanda-sparsity=0.5" / "plan.safetensors"
    run_in(few)
    plan = place.read_bytes()
    run_in(sweep_of({"method": "wanda", "sparsity": [0.5]}, calibration={"samples": 4, "length": 32}), resume=True)
    assert place.read_bytes() != plan
    results = run_in(few, resume=True)
    assert place.read_bytes() == plan and results.reused == 1
    assert runs == {DENSE: 1, "wanda-sparsity=0.3": 1, "wanda-sparsity=0.5": 3}
    # the name's last points are those of the first sweep again
    assert run_in(more, resume=True).reused == 0


def test_what_is_measured_last_does_not_take_the_plan_of_another_sweep(sweep_of, run_in, monkeypatch, tmp_path):
    run_in(sweep_of({"method": "wanda", "sparsity": [0.5]}, calibration={"samples": 2, "length": 32}))
    plan = next((tmp_path / "out" / "plans").rglob("plan.safetensors"))
    before = plan.read_bytes()
    measuring = worker.Worker._evaluate

    def killed(self, name, *models):
        if name != DENSE:
            raise KeyboardInterrupt
        return measuring(self, name, *models)

    monkeypatch.setattr(worker.Worker, "_evaluate", killed)
    with pytest.raises(KeyboardInterrupt):
        run_in(sweep_of({"method": "wanda", "sparsity": [0.5]}, calibration={"samples": 4, "length": 32}), resume=True)
    assert plan.read_bytes() == before


def test_a_point_without_its_plan_is_done_again(sweep_of, run_in, runs, tmp_path):
    import shutil

    sweep = sweep_of({"method": "magnitude", "sparsity": [0.3, 0.5]})
    run_in(sweep)
    shutil.rmtree(tmp_path / "out" / "plans" / "magnitude-sparsity=0.3")
    run_in(sweep, resume=True)
    assert runs == {DENSE: 1, "magnitude-sparsity=0.3": 2, "magnitude-sparsity=0.5": 1}


def refusal(sweep, folder, **how):
    job = make_job(sweep, folder, trust_remote_code=False, plugins=())
    with pytest.raises(OutputError) as caught:
        open_journal(folder, job, **{"resume": False, "overwrite": False, **how})
    return str(caught.value)


def test_folders_that_are_refused(sweep_of, run_in, tmp_path):
    sweep = sweep_of({"method": "magnitude"})
    run_in(sweep)
    out = tmp_path / "out"
    assert "pass --resume to go on with it, or --overwrite" in refusal(sweep, out)
    assert "windows: 2 then, 3 now" in refusal(sweep_of({"method": "magnitude"}, windows=3), out, resume=True)
    precious = tmp_path / "precious"
    (precious / "plans").mkdir(parents=True)
    for how in ({}, {"resume": True}, {"overwrite": True}):
        assert "holds no sweep" in refusal(sweep, precious, **how)
    assert (precious / "plans").is_dir()
    (tmp_path / "file").write_text("x")
    assert "holds no sweep" in refusal(sweep, tmp_path / "file")
    Journal(out, {}).path.write_text("{}\n")
    assert "not the journal of a sweep" in refusal(sweep, out, resume=True)
    Journal(out, {}).path.write_text("what?\nis\n")
    assert "line 1 is damaged" in refusal(sweep, out, resume=True)


def test_overwrite_removes_what_a_sweep_has_written_and_nothing_else(sweep_of, run_in, tmp_path):
    sweep = sweep_of({"method": "magnitude"})
    run_in(sweep)
    out = tmp_path / "out"
    (out / "mine.txt").write_text("x")
    job = make_job(sweep, out, trust_remote_code=False, plugins=())
    _, finished = open_journal(out, job, resume=False, overwrite=True)
    assert finished == {}
    assert sorted(p.name for p in out.iterdir()) == ["journal.jsonl", "mine.txt"]


def test_another_model_under_the_same_name_is_noticed(sweep_of, run_in, tmp_path, make_llama, tiny_tokenizer):
    folder = tmp_path / "model"
    for seed in (0, 1):
        make_llama(seed=seed, max_position_embeddings=1024).save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        grid = {"method": "magnitude", "sparsity": [0.3, 0.4][: seed + 1]}
        if seed == 0:
            run_in(sweep_of(grid, model=str(folder)))
    with pytest.raises(OutputError, match="has other weights than when"):
        run_in(sweep_of(grid, model=str(folder)), resume=True)


def test_a_dense_model_that_cannot_be_measured_is_a_failure(sweep_of, run_in):
    results = run_in(sweep_of({"method": "magnitude"}, evaluate=["perplexity:missing.txt"]))
    assert [r.name for r in results.failed] == [DENSE, results.points[0].name]
    assert "missing.txt" in results.failed[0].error


class Pairs(InSequence):
    """Two workers in name only: both take a task before either does it. ``events`` tells what starts and ends when."""

    def __init__(self, job):
        super().__init__(job)
        self.events = []

    @property
    def free(self):
        return len(self._waiting) < 2

    def submit(self, task):
        super().submit(task)
        self.events.append(("start", task.point))

    def next(self):
        task, outcome = super().next()
        self.events.append(("end", task.point))
        return task, outcome


def test_no_two_workers_compute_the_same_statistics(sweep_of, run_in):
    pools = []

    def pool(job):
        pools.append(Pairs(job))
        return pools[0]

    sweep = sweep_of({"method": ["flap", "shortgpt", "magnitude"], "sparsity": [0.5, 0.6], "seed": [0, 1]})
    results = run_in(sweep, pool=pool)
    assert len(results.points) == 12 and all(r.done for r in results.points)
    stored, running, most = set(), {}, 0
    for what, point in pools[0].events:
        if point is None:
            continue
        if what == "start":
            needed = statistics_of(point) - stored
            assert not any(needed & other for other in running.values()), point.name
            running[point.key] = needed
            most = max(most, len(running))
        else:
            stored |= running.pop(point.key)
    # it waits for no more than it must
    assert most == 2


def test_statistics_are_computed_once_and_shared(sweep_of, run_in, monkeypatch, tmp_path):
    from secateur.observe.driver import BlockWalk

    observed = Counter()
    observe = BlockWalk.observe

    def counting(self, block, layer, modules, statistics, **options):
        observed[layer, tuple(sorted(statistics))] += 1
        return observe(self, block, layer, modules, statistics, **options)

    monkeypatch.setattr(BlockWalk, "observe", counting)
    results = run_in(sweep_of({"method": "flap", "sparsity": [0.3, 0.5, 0.6], "seed": [0, 1]}))
    assert all(r.done for r in results.points)
    assert set(observed.values()) == {1} and len(observed) == 2
    # and a point that finds its statistics is the point that computes them
    shared = {r.name: r.metrics for r in results.points}
    (tmp_path / "out").rename(tmp_path / "first")
    (alone,) = run_in(sweep_of({"method": "flap", "sparsity": 0.6, "seed": 1})).points
    assert alone.metrics == shared[alone.name] and sum(observed.values()) == 4


def test_what_statistics_a_point_shares(sweep_of):
    by_name = {
        p.name: statistics_of(p)
        for p in sweep_of({"method": ["flap", "wanda", "magnitude"], "sparsity": [0.3, 0.5], "seed": [0, 1]}).points
    }
    # the built-in text is read from its start, whatever the seed
    assert len({frozenset(found) for name, found in by_name.items() if name.startswith("flap")}) == 1
    assert by_name["flap-sparsity=0.3-seed=0"]
    sampled = sweep_of({"method": "flap", "source": "self", "seed": [0, 1]}).points
    assert not statistics_of(sampled[0]) & statistics_of(sampled[1])
    assert by_name["magnitude-sparsity=0.3-seed=0"] == by_name["wanda-sparsity=0.3-seed=0"] == set()


def test_points_share_what_their_allocators_look_at(sweep_of):
    grid = {"method": "wanda", "sparsity": [0.3, 0.5], "allocate": ["owl", "influence", "adapt", "erk"]}
    found = {p.name.removeprefix("wanda-sparsity="): statistics_of(p) for p in sweep_of(grid).points}
    assert found["0.3-allocate=owl"] == found["0.5-allocate=owl"] != set()
    assert found["0.3-allocate=influence"] == found["0.3-allocate=adapt"] != found["0.3-allocate=owl"]
    assert found["0.3-allocate=erk"] == set()
    # a whole block is what shortgpt looks at as well
    (blocks,) = sweep_of({"method": "shortgpt", "sparsity": 0.5}).points
    assert statistics_of(blocks) == found["0.3-allocate=influence"]


SEARCH = {"trials": 5, "objective": ["perplexity:builtin", "parameters"], "method": ["magnitude_sp", "random_sp"]}


def test_a_search_makes_its_trials(sweep_of, run_in, runs):
    pytest.importorskip("optuna")
    results = run_in(sweep_of(search={**SEARCH, "sparsity": [0.2, 0.7]}))
    assert len(results.points) == 5 and all(r.done for r in results.points)
    assert all(0.2 <= r.values["sparsity"] <= 0.7 for r in results.points)
    again = run_in(sweep_of(search={**SEARCH, "sparsity": [0.2, 0.7], "trials": 7}), resume=True)
    assert len(again.points) == 7 and [r.key for r in again.points[:5]] == [r.key for r in results.points]
    assert set(runs.values()) == {1} and len(runs) == 8


def test_a_search_has_no_points_of_another_one(sweep_of, run_in, runs):
    pytest.importorskip("optuna")
    first = run_in(sweep_of(search={**SEARCH, "sparsity": [0.2, 0.7]}))
    narrow = sweep_of(search={**SEARCH, "sparsity": [0.3, 0.6], "trials": 6})
    results = run_in(narrow, resume=True)
    inside = [r.key for r in first.points if 0.3 <= r.values["sparsity"] <= 0.6]
    assert 0 < len(inside) < 5 and [r.key for r in results.points[: len(inside)]] == inside
    assert len(results.points) == 6 and set(runs.values()) == {1}
    # other data make other points of the same values
    more = sweep_of(search={**SEARCH, "sparsity": [0.2, 0.7], "trials": 1}, calibration={"samples": 3, "length": 32})
    [point] = run_in(more, resume=True).points
    assert point.key not in {r.key for r in first.points}


def test_a_search_runs_no_point_twice(sweep_of, run_in, runs):
    pytest.importorskip("optuna")
    results = run_in(sweep_of(search={**SEARCH, "trials": 12}), pool=Pairs)
    assert len(results.points) == 2 and set(runs.values()) == {1}


def test_a_search_survives_a_failing_point(sweep_of, run_in, faulty):
    pytest.importorskip("optuna")
    faulty("raise RuntimeError('never')", times=99)
    search = {"trials": 8, "method": "faulty", "sparsity": {"choices": [0.3, 0.5]}}
    results = run_in(sweep_of(search=search, retries=0))
    assert {(r.values["sparsity"], r.done) for r in results.points} == {(0.3, True), (0.5, False)}


def test_objectives_know_their_direction(sweep_of, run_in):
    sweep = sweep_of(
        search={"method": ["magnitude"], "objective": ["decode", "peak memory"]},
        evaluate=["perplexity:builtin", "speed:prompt=8,new=2,repeats=1"],
    )
    dense = run_in(sweep_of({"method": "magnitude"}, evaluate=sweep.base.evaluate)).dense
    assert objectives(sweep.search, dense) == [("decode", "maximize"), ("peak memory", "minimize")]
    asked = sweep.search.model_copy(update={"objective": []})
    assert objectives(asked, dense) == [("perplexity:builtin", "minimize")]
    with pytest.raises(UsageError, match=r"'paramters' is not among.*did you mean 'parameters'"):
        objectives(sweep.search.model_copy(update={"objective": ["paramters"]}), dense)


def test_records_survive_the_journal(tmp_path):
    from secateur.report import Metric

    record = Record("a", "k", {"s": 0.5}, 0.5, (Metric("m", "", {"a": 1.0}, False, "p"),), "w", 1.5, 3, ("n",), 2)
    assert Record.from_dict(json.loads(json.dumps(record.to_dict()))) == record


def test_a_journal_holds_texts_with_line_ends_of_any_kind(tmp_path):
    journal = Journal(tmp_path, {"model": "m"})
    journal.start()
    record = Record("a", "k", {"text": "one\u2028two\x85three\r\nfour\x0cfive"}, notes=("six\u2029seven",))
    journal.add(record)
    assert journal.resume() == {"k": record}


def test_a_worker_gives_errors_back_as_values(sweep_of, tmp_path, monkeypatch):
    from secateur import api

    job = make_job(
        sweep_of({"method": "magnitude"}, model=str(tmp_path / "none")), tmp_path, trust_remote_code=False, plugins=()
    )
    outcome = worker.Worker(job).run(None)
    assert isinstance(outcome, Failure) and not outcome.final and "there is no model" in outcome.error

    def full(*arguments, **options):
        torch.empty(2**50, dtype=torch.uint8)

    monkeypatch.setattr(api, "load", full)
    said = "out of memory: 1,125,899.9 GB more were asked for"
    assert worker.Worker(job).run(None) == Failure(said, final=False)
    monkeypatch.setattr(api, "load", lambda *_, **__: {}["nowhere"])
    assert worker.Worker(job).run(None) == Failure("KeyError: 'nowhere'", final=False)
