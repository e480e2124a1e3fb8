"""What a sweep is expected to take: by hand on a machine whose rates are known, and what the commands say."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

import secateur as sc
from secateur.estimate.build import jobs_of
from secateur.estimate.machine import Machine
from secateur.estimate.sizes import sizes_of
from secateur.estimate.work import seconds
from secateur.models.sources import Source
from secateur.report.numbers import format_bytes
from secateur.sweep import expected as ahead
from secateur.sweep.expected import Expected, expect
from secateur.sweep.runner import make_job
from secateur.sweep.spec import make_sweep

RATE = 1e9
# 2 blocks of 3 x 1024 + 3 x 2048 linear weights, and a head of 512 x 32; attention of 32 channels, 512 words
LINEAR, HEAD, WINDOWS, LENGTH = 2 * (3 * 1024 + 3 * 2048), 512 * 32, 3, 16
RECIPE = {"calibration": {"samples": 4, "length": LENGTH}, "windows": WINDOWS, "dtype": "float32"}


@pytest.fixture
def dense(tiny_checkpoint, monkeypatch):
    """The tiny model, on a machine all of whose rates are 1e9."""
    known = Machine(*[RATE] * len(fields(Machine)))
    monkeypatch.setattr(ahead, "try_measuring", lambda *_: known)
    monkeypatch.setattr(ahead, "try_machines", lambda _, jobs: [known] * len(jobs))
    return sc.load(tiny_checkpoint, dtype="auto")[0]


def expected(model, folder, *grids, dense=False, untrained=(), **recipe):
    sweep = make_sweep({**RECIPE, "model": str(folder), **recipe, "sweep": {"grid": list(grids)}}, "test")
    job = make_job(sweep, folder, trust_remote_code=False, plugins=(), untrained=untrained)
    return expect(sweep.points, job, model, dense=dense)


def measuring(gone=0.0):
    """One forward: products, attention to half of a window in both blocks, and what moves beside them."""
    operations = 2 * (LINEAR + HEAD - gone) + 2 * 2 * LENGTH * 32
    moved = 4 * (2 * (24 * 32 + 6 * 64 + 12 * 32) + 8 * 512)
    return WINDOWS * LENGTH * (operations + moved) / RATE


def planning(model, method, **options):
    """All stages of planning in this process, by the estimate of a run."""
    sweep = make_sweep({**RECIPE, "model": "m", "sweep": {"grid": {"method": [method], "sparsity": [0.5]}}}, "test")
    (job,) = jobs_of(sweep.points[0].recipe, model.dtype)
    return seconds(sizes_of(Source(model)), job, Machine(*[RATE] * len(fields(Machine))))


def test_every_point_is_planned_and_measured(dense, tmp_path):
    grid = {"method": ["magnitude_sp"], "sparsity": [0.5]}
    taken = planning(dense, "magnitude_sp")
    assert taken["write"] > 0
    alone = expected(dense, tmp_path, grid)
    assert alone.points == 1
    assert alone.seconds == pytest.approx(sum(taken.values()) - taken["write"] + measuring(gone=LINEAR / 2))
    beside = expected(dense, tmp_path, grid, dense=True)
    assert beside.seconds == pytest.approx(alone.seconds + measuring())
    # two texts, read by both
    twice = expected(dense, tmp_path, grid, dense=True, evaluate=["perplexity:builtin", "perplexity:self", "macs"])
    assert twice.seconds == pytest.approx(beside.seconds + measuring() + measuring(gone=LINEAR / 2))


def test_statistics_are_taken_once(dense, tmp_path):
    def of(*sparsities, **more):
        return expected(dense, tmp_path, {"method": ["flap"], "sparsity": list(sparsities), **more}).seconds

    taken = planning(dense, "flap")
    spared = taken["forwards"] + taken["statistics"]
    assert spared > 0 and of(0.5, 0.51) == pytest.approx(of(0.5) + of(0.51) - spared)
    # a refit reads the text behind what its own point decides, and a method that sees cut blocks has its own statistics
    refitted = {"heal": ["refit"]}
    assert of(0.5, 0.51, **refitted) == pytest.approx(of(0.5, **refitted) + of(0.51, **refitted))
    alone = {"method": ["wanda_sp"], "sparsity": [0.5]}
    several = expected(dense, tmp_path, alone, {**alone, "sparsity": [0.51]}).seconds
    assert several == pytest.approx(
        expected(dense, tmp_path, alone).seconds + expected(dense, tmp_path, {**alone, "sparsity": [0.51]}).seconds
    )


def test_a_training_and_what_is_measured_before_it_count(dense, tmp_path):
    pytest.importorskip("accelerate")
    grid = {"method": ["magnitude_sp"], "sparsity": [0.5]}
    plain = expected(dense, tmp_path, grid).seconds
    heal = "lora:steps=2,batch=1,length=16"
    trained = expected(dense, tmp_path, grid, steps=[{"heal": heal}]).seconds
    before = expected(dense, tmp_path, grid, steps=[{"heal": heal}], untrained=("perplexity:builtin",)).seconds
    assert trained > plain + measuring(gone=LINEAR / 2)
    assert before == pytest.approx(trained + measuring(gone=LINEAR / 2))


def test_a_method_that_comes_with_and_without_text_and_training_is_tried_as_what_it_does(tiny_checkpoint, tmp_path):
    # magnitude multiplies nothing until it refits, or what it leaves is trained
    model = sc.load(tiny_checkpoint, dtype="auto")[0]
    heals = [["none"], ["refit"], ["norms:steps=1,batch=1,length=16"]]
    grids = [{"method": ["magnitude"], "sparsity": [0.5], "heal": heal} for heal in heals]
    assert expected(model, tmp_path, *grids).seconds < 60


@pytest.mark.parametrize(
    ("found", "line"),
    [
        (Expected(1, lambda: 40.0), "1 point, up to 3.0 GB of memory, about 40 s"),
        (Expected(24, lambda: 7500.0), "24 points, up to 3.0 GB of memory, about 2 h 5 min"),
        (Expected(2, lambda: 300.0, ("a",)), "2 points, up to 3.0 GB of memory, about 5 min, and what a takes"),
        (
            Expected(2, lambda: 300.0, ("a", "b")),
            "2 points, up to 3.0 GB of memory, about 5 min, and what a and b take",
        ),
    ],
)
def test_the_line_names_what_nobody_knows(found, line):
    assert replace(found, memory=3 * 10**9).line() == line


def test_the_largest_point_is_what_has_to_fit(dense, tmp_path, monkeypatch):
    sizes, there = sizes_of(Source(dense)), 10**9
    monkeypatch.setattr(ahead, "resident_bytes", lambda: there)
    monkeypatch.setattr(ahead, "available_memory", lambda: 10**6)
    grid = {"method": ["magnitude_sp"], "sparsity": [0.5]}
    # what is cut is a copy at first, and 2048 tokens are measured together
    cut = expected(dense, tmp_path, grid)
    assert cut.memory == there + sizes.stored + 2048 * 512 * 4
    assert cut.available_memory == there + 10**6 < cut.memory and cut.problem
    # a second step works beside what the first one left, and gradients of a whole model take more than either
    text = {"samples": 256, "length": 64}
    hungry = {"method": ["llm_pruner"], "sparsity": [0.5]}
    monkeypatch.setattr(ahead, "available_memory", lambda: cut.memory - there)
    larger = expected(dense, tmp_path, grid, hungry, calibration=text)
    assert larger.largest == "llm_pruner-sparsity=0.5" and larger.points == 2 and larger.memory > cut.memory
    steps = [{"method": "magnitude_sp", "sparsity": 0.5}, {"method": "llm_pruner"}]
    behind = expected(dense, tmp_path, {"steps.2.sparsity": [0.5]}, steps=steps, calibration=text)
    assert behind.memory == larger.memory + sizes.stored
    assert larger.problem == (
        f"llm_pruner-sparsity=0.5 would take {format_bytes(larger.memory)} of memory, and 1.0 GB are there:"
        " leave it out, calibrate on fewer or shorter windows, or try all the same with --no-estimate"
    )
    on_device = replace(larger, available_memory=larger.memory, device_memory=2 * 10**9, available_device_memory=10**9)
    assert "would take 2.0 GB of the device's memory, and 1.0 GB are there" in on_device.problem
    assert not replace(on_device, available_device_memory=None).problem
    # where several can't fit, the first of them is named
    monkeypatch.setattr(ahead, "available_memory", lambda: 0)
    assert expected(dense, tmp_path, grid, hungry, calibration=text).largest == "magnitude_sp-sparsity=0.5"


def test_what_another_device_holds_is_counted_there(dense, tmp_path, monkeypatch):
    sizes, grid = sizes_of(Source(dense)), {"method": ["magnitude_sp"], "sparsity": [0.5]}
    monkeypatch.setattr(ahead, "resident_bytes", lambda: 10**9)
    monkeypatch.setattr(ahead, "available_on", lambda device: 10**6 if device == "cuda" else None)
    found = expected(dense, tmp_path, grid, device="cuda")
    # the copy and what it predicts; here only what plans from weights take at work
    assert found.device_memory == sizes.stored + 2048 * 512 * 4
    assert 10**9 <= found.memory < 10**9 + sizes.stored
    assert found.problem == (
        "magnitude_sp-sparsity=0.5 would take 4.4 MB of the device's memory, and 1.0 MB are there: any point holds the"
        " model and a copy of it, where 'secateur prune' reads one block at a time; try all the same with --no-estimate"
    )


def test_tasks_of_unknown_length_are_named(dense, tmp_path):
    grid = {"method": ["magnitude_sp"], "sparsity": [0.5]}
    assert expected(dense, tmp_path, grid, evaluate=["perplexity", "speed"]).unknown == ("speed",)


COMPARE = ("compare", "--methods", "random_sp,magnitude_sp", "--sparsity", "0.5")
CURVE = ("curve", "--method", "magnitude", "--sparsities", "0.3,0.5")


@pytest.mark.parametrize(("command", "points"), [(COMPARE, 2), (CURVE, 2)])
def test_commands_say_it_first(cli, tiny_checkpoint, tmp_path, command, points):
    name, *asked = command
    arguments = (name, tiny_checkpoint, *asked, "--samples", 2, "--length", 32, "--windows", 2)
    run = cli(*arguments, "--out", tmp_path / "out")
    assert run.code == 0, run.err
    assert run.err.splitlines()[0].startswith(f"estimate: {points} points, up to ")
    # nothing is left to take time
    assert "estimate: " not in cli(*arguments, "--out", tmp_path / "out", "--resume").err
    for option in ("--no-estimate", "--quiet"):
        assert "estimate: " not in cli(*arguments, "--out", tmp_path / option, option).err


@pytest.mark.parametrize("quiet", [(), ("--quiet",)])
def test_what_can_t_fit_is_refused_and_nothing_is_lost(cli, tiny_checkpoint, tmp_path, monkeypatch, quiet):
    name, *asked = COMPARE
    arguments = (
        name,
        tiny_checkpoint,
        *asked,
        "--samples",
        2,
        "--length",
        32,
        "--windows",
        2,
        "--out",
        tmp_path / "out",
    )
    assert cli(*arguments, "--no-estimate").code == 0
    before = (tmp_path / "out" / "compare.json").read_bytes()
    monkeypatch.setattr(ahead, "available_memory", lambda: 0)
    # nothing is timed for what can't run
    monkeypatch.setattr(ahead, "try_measuring", pytest.fail)
    more = (*arguments, "--methods", "random_sp,magnitude_sp,flap", "--resume")
    run = cli(*more, *quiet)
    assert run.code == 1
    assert "flap-sparsity=0.5-seed=0 would take " in run.err and "estimate: " not in run.err and not run.out
    assert (tmp_path / "out" / "compare.json").read_bytes() == before
    assert cli(*more, "--no-estimate").code == 0


def test_a_sweep_says_it_first_and_tells_itself_what_can_t_be_had(cli, tiny_checkpoint, tmp_path):
    recipe = tmp_path / "sweep.yaml"
    text = "model: {}\ncalibration: {{samples: 2, length: 32}}\nwindows: 2\nsweep: {{grid: {{sparsity: [0.3, 0.5]}}}}\n"
    recipe.write_text(text.format(tiny_checkpoint) + "steps: [{method: magnitude}]\n", encoding="utf8")
    run = cli("sweep", recipe, "--workers", 1, "--out", tmp_path / "out")
    assert run.code == 0 and run.err.splitlines()[0].startswith("estimate: 2 points, up to "), run.err
    recipe.write_text(text.format(tmp_path / "nowhere") + "steps: [{method: magnitude}]\n", encoding="utf8")
    run = cli("sweep", recipe, "--workers", 1, "--out", tmp_path / "other")
    assert run.code == 1 and "estimate: " not in run.err and "Traceback" not in run.err
