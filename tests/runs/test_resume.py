"""A run that dies, however and whenever, goes on later and ends in the same bytes."""

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest

import secateur as sc
from secateur.errors import BudgetError, NonFiniteError, OutputError
from secateur.runs import pipeline
from secateur.runs.folder import Journal, run_path
from secateur.runs.signals import Stopped

CASES = {
    "wanda": {"method": "wanda", "sparsity": 0.5},
    "sparsegpt": {"method": "sparsegpt", "pattern": "2:4"},
    "flap": {"method": "flap", "sparsity": 0.3},
    "magnitude, global": {"method": "magnitude", "sparsity": 0.5, "options": {"scope": "global"}},
    "shortgpt": {"method": "shortgpt", "options": {"layers": 1}},
    "slicegpt": {"method": "slicegpt", "sparsity": 0.25},
    "vocab": {"method": "vocab", "sparsity": 0.4},
    "blockpruner": {"method": "blockpruner", "options": {"sublayers": 3}},
    "evopress": {"method": "evopress", "options": {"layers": 1, "starts": 2, "generations": 3, "offspring": 2}},
    "icbs": {"method": "icbs", "sparsity": 0.5, "heal": "refit", "options": {"block": 64, "batch": 2, "checks": 2}},
    "tyr": {
        "method": "tyr",
        "sparsity": 0.4,
        "options": {"levels": 3, "generations": 2, "offspring": 2, "stage_tokens": "16,64", "survivors": "1"},
    },
    "llm_pruner": {"method": "llm_pruner", "sparsity": 0.3, "options": {"criterion": "param_mix"}},
    "llm_pruner, channels": {"method": "llm_pruner", "sparsity": 0.25, "options": {"granularity": "channel"}},
    "loraprune": {
        "method": "loraprune",
        "sparsity": 0.3,
        "options": {"steps": 4, "batch": 2, "every": 1, "rank": 2, "dropout": 0.2, "lr": 1e-2},
    },
    "wanda, owl": {"method": "wanda", "sparsity": 0.5, "allocate": "owl"},
    "magnitude, search": {"method": "magnitude", "sparsity": 0.5, "allocate": "search:generations=3,offspring=2"},
    "two streams": {"method": "wanda", "sparsity": 0.5, "heal": "refit", "target": "stream"},
    "matrix by matrix": {"method": "alps", "sparsity": 0.5, "target": "stream", "options": {"true_sequential": True}},
    "steps, refitted": {"method": "adapt_pruner", "sparsity": 0.3, "heal": "refit", "options": {"steps": 4}},
    "refit afterwards": {"method": "flap", "sparsity": 0.3, "heal": "refit", "target": "dense"},
}


class Crash(BaseException):
    """What no handler expects; as sudden as a process can end within a test."""


@pytest.fixture(autouse=True)
def states_after_every_step(monkeypatch) -> None:
    """Searches on the whole model are kept so often that a crash between two states is one between two steps."""
    monkeypatch.setattr("secateur.engine.search.SECONDS_BETWEEN_STATES", 0.0)


@pytest.fixture(scope="module")
def dense(tmp_path_factory, make_llama, tiny_tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    make_llama(num_hidden_layers=4).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def recipe(dense: Path, out: Path, *steps: dict, **more) -> dict:
    data = {"samples": 4, "length": 32}
    return {"model": str(dense), "out": str(out), "calibration": data, "steps": list(steps), "dtype": "float32", **more}


def files(folder: Path) -> dict[str, bytes]:
    """Everything whose bytes are promised; the report and the card tell of times."""
    told = {"report.json", "README.md", "manifest.json"}
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in told
    }


def crash_after(monkeypatch, count: int, error: BaseException | type[BaseException] = Crash) -> None:
    """Die right before or right after the ``count``-th line of a journal."""
    add, left = Journal.add, [count]

    def dying(self: Journal, **entry: object) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise error
        add(self, **entry)

    monkeypatch.setattr(Journal, "add", dying)


@pytest.mark.parametrize("case", CASES)
def test_a_crash_before_any_line_of_the_journal(case, dense, tmp_path, monkeypatch):
    whole = recipe(dense, tmp_path / "whole", CASES[case], max_shard_size="60KB")
    sc.run(whole)
    job, crashes = {**whole, "out": str(tmp_path / "out")}, 0
    # the first line is never written, then the second, ...: every place where a run can die
    for count in range(1, 100):
        with monkeypatch.context() as patch:
            crash_after(patch, 2 if count > 1 else 1)
            try:
                sc.run(job, resume=count > 1)
                break
            except Crash:
                crashes += 1
    assert crashes >= 6
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert not run_path(tmp_path / "out").exists()


def test_a_training_of_another_length_does_not_go_on(dense, tmp_path, monkeypatch):
    job = recipe(dense, tmp_path / "out", CASES["loraprune"])
    with monkeypatch.context() as patch:
        crash_after(patch, 3)
        with pytest.raises(Crash):
            sc.run(job)
    job["steps"] = [{**CASES["loraprune"], "options": {**CASES["loraprune"]["options"], "steps": 6}}]
    with pytest.raises(OutputError, match=r"can't go on: its step 1 differs in options"):
        sc.run(job, resume=True)


def test_two_steps_resume_in_the_second(dense, tmp_path, monkeypatch):
    steps = [CASES["flap"], CASES["wanda"]]
    sc.run(recipe(dense, tmp_path / "whole", *steps))
    job = recipe(dense, tmp_path / "out", *steps)
    with monkeypatch.context() as patch:
        crash_after(patch, 14)
        with pytest.raises(Crash):
            sc.run(job)
    assert (tmp_path / "out.run" / "step-2" / "journal.jsonl").stat().st_size
    sc.run(job, resume=True)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@pytest.mark.parametrize("behind", [[CASES["wanda"]], [], [CASES["vocab"], CASES["wanda"]]], ids=len)
def test_a_step_that_cannot_be_planned_leaves_those_before_it_for_another_one(behind, dense, tmp_path, monkeypatch):
    def asked(*steps: dict, out: str = "out") -> dict:
        return recipe(dense, tmp_path / out, CASES["flap"], *steps)

    sc.run(asked(*behind, out="whole"))
    said = re.escape(f"{tmp_path / 'out'}.run holds what step 1 left: another step behind it, or none, with --resume")
    with monkeypatch.context() as patch:
        # found when the second of the blocks is decided
        crash_after(patch, 14, NonFiniteError("NaN in a block"))
        with pytest.raises(NonFiniteError, match=f"^NaN in a block; {said}"):
            sc.run(asked({"method": "wanda", "sparsity": 0.6}))
    with pytest.raises(BudgetError, match=said):
        sc.run(asked({"method": "shortgpt", "options": {"layers": 9}}), resume=True)
    decided = []
    decide = pipeline.decide

    def watched(method, *rest, **how) -> None:
        decided.append(method.name)
        decide(method, *rest, **how)

    monkeypatch.setattr(pipeline, "decide", watched)
    sc.run(asked(*behind), resume=True)
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert decided == [step["method"] for step in behind] and not run_path(tmp_path / "out").exists()


def test_a_step_that_has_begun_is_not_exchanged(dense, tmp_path, monkeypatch):
    job = recipe(dense, tmp_path / "out", CASES["flap"], CASES["wanda"])
    with monkeypatch.context() as patch:
        crash_after(patch, 14)
        with pytest.raises(Crash):
            sc.run(job)
    for steps, said in (
        ([CASES["flap"], {"method": "wanda", "sparsity": 0.6}], r"differs in sparsity \(0.5 then, 0.6 now\)"),
        ([CASES["flap"]], "isn't asked for any more"),
    ):
        with pytest.raises(OutputError, match=rf"its step 2 {said}; remove .*out\.run.step-2 to have it as asked$"):
            sc.run({**job, "steps": steps}, resume=True)
    shutil.rmtree(run_path(tmp_path / "out") / "step-2")
    sc.run({**job, "steps": [CASES["flap"]]}, resume=True)
    sc.run(recipe(dense, tmp_path / "whole", CASES["flap"]))
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_finished_blocks_are_not_observed_again(dense, tmp_path, monkeypatch):
    from secateur.observe.driver import BlockWalk

    observed = []
    observe = BlockWalk.observe

    def watched(self: BlockWalk, block: object, layer: int, *rest: object, **options: object) -> object:
        observed.append(layer)
        return observe(self, block, layer, *rest, **options)

    monkeypatch.setattr(BlockWalk, "observe", watched)
    job = recipe(dense, tmp_path / "out", CASES["wanda"])
    with monkeypatch.context() as patch:
        crash_after(patch, 4)
        with pytest.raises(Crash):
            sc.run(job)
    assert observed == [0, 1, 2, 3]
    sc.run(job, resume=True)
    assert observed == [0, 1, 2, 3, 3]


def test_killed_ten_times_at_random_moments(dense, tmp_path):
    """Real processes, really killed; forked, so that none has to import torch again."""
    job = recipe(dense, tmp_path / "out", CASES["sparsegpt"], calibration={"samples": 24, "length": 128})
    sc.run({**job, "out": str(tmp_path / "whole")})
    started = time.perf_counter()
    sc.run({**job, "out": str(tmp_path / "timed")})
    seconds = time.perf_counter() - started
    killed, resume = 0, False
    while killed < 10:
        child = os.fork()
        if child == 0:
            # nothing of the test may run on in the child
            try:
                sc.run(job, resume=resume)
            finally:
                os._exit(0)
        # spread over the whole run: the first moments of a resumed one are its start
        time.sleep(seconds * (0.15 + 0.085 * killed))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        killed += 1
        resume = (run_path(tmp_path / "out") / "run.json").is_file()
        if (tmp_path / "out").exists():
            break
    if not (tmp_path / "out").exists():
        sc.run(job, resume=resume)
    assert killed >= 3
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_killed_in_the_middle_of_a_search(dense, tmp_path, monkeypatch):
    """A real process, really killed, after the first candidates of Tyr's search have been kept."""
    job = recipe(dense, tmp_path / "out", CASES["tyr"])
    child = os.fork()
    if child == 0:
        add = Journal.add

        def killing(self: Journal, **entry: object) -> None:
            add(self, **entry)
            if "value" in entry:
                os.kill(os.getpid(), signal.SIGKILL)

        monkeypatch.setattr(Journal, "add", killing)
        try:
            sc.run(job)
        finally:
            os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert not (tmp_path / "out").exists()
    sc.run(job, resume=True)
    sc.run({**job, "out": str(tmp_path / "whole")})
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_signal_stops_at_the_next_block(dense, tmp_path, monkeypatch):
    job = recipe(dense, tmp_path / "out", CASES["wanda"])
    add = Journal.add

    def signalled(self: Journal, **entry: object) -> None:
        add(self, **entry)
        if entry.get("block") == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", signalled)
        with pytest.raises(Stopped, match=r"stopped after block 2 of 4; .*out\.run holds what is done: .*--resume"):
            sc.run(job)
    assert not (tmp_path / "out").exists()
    sc.run(job, resume=True)
    sc.run({**job, "out": str(tmp_path / "whole")})
    assert files(tmp_path / "out") == files(tmp_path / "whole")


@pytest.fixture
def stopped(dense, tmp_path, monkeypatch) -> dict:
    """A run that was stopped after its second block."""
    job = recipe(dense, tmp_path / "out", CASES["wanda"])
    with monkeypatch.context() as patch:
        crash_after(patch, 3)
        with pytest.raises(Crash):
            sc.run(job)
    return job


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"steps": [{"method": "wanda", "sparsity": 0.6}]}, r"its step 1 differs in sparsity \(0.5 then, 0.6 now\)$"),
        ({"calibration": {"samples": 5, "length": 32}}, "its recipe differs in calibration"),
        ({"format": "packed"}, r"its step 1 differs in format \(dense then, packed now\)"),
    ],
)
def test_another_request_does_not_resume(stopped, tmp_path, change, said):
    with pytest.raises(OutputError, match=said):
        sc.run({**stopped, **change}, resume=True)
    assert run_path(tmp_path / "out").is_dir()


def test_the_same_weights_under_another_config_do_not_resume(stopped, tmp_path):
    config = Path(stopped["model"]) / "config.json"
    before = config.read_text()
    try:
        config.write_text(json.dumps(json.loads(before) | {"rms_norm_eps": 0.1}))
        with pytest.raises(OutputError, match=r"its config differs in rms_norm_eps \(.* then, 0.1 now\)"):
            sc.run(stopped, resume=True)
    finally:
        config.write_text(before)


def test_other_weights_do_not_resume(stopped, make_llama, tiny_tokenizer, tmp_path):
    make_llama(num_hidden_layers=4, seed=1).save_pretrained(tmp_path / "other")
    tiny_tokenizer.save_pretrained(tmp_path / "other")
    document = json.loads((tmp_path / "out.run" / "run.json").read_text())
    document["recipe"]["model"] = str(tmp_path / "other")
    (tmp_path / "out.run" / "run.json").write_text(json.dumps(document))
    with pytest.raises(OutputError, match="its model differs in "):
        sc.run({**stopped, "model": str(tmp_path / "other")}, resume=True)


def test_a_text_that_has_changed_does_not_resume(dense, tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 40, encoding="utf8")
    calibration = {"source": str(text), "samples": 4, "length": 32}
    job = recipe(dense, tmp_path / "out", CASES["wanda"], calibration=calibration)
    with monkeypatch.context() as patch:
        crash_after(patch, 3)
        with pytest.raises(Crash):
            sc.run(job)
    text.write_text("pack my box with five dozen liquor jugs\n" * 40, encoding="utf8")
    with pytest.raises(OutputError, match=r"out\.run can't go on: its text has changed since it began"):
        sc.run(job, resume=True)
    assert run_path(tmp_path / "out").is_dir()


@pytest.mark.parametrize("case", ["flap", "shortgpt", "wanda, owl", "refit afterwards"])
def test_kept_statistics_may_be_gone_when_a_run_goes_on(case, dense, tmp_path, monkeypatch):
    sc.run(recipe(dense, tmp_path / "whole", CASES[case]), statistics=tmp_path / "statistics")
    for lines in (2, 4):
        job = recipe(dense, tmp_path / f"out-{lines}", CASES[case])
        with monkeypatch.context() as patch:
            crash_after(patch, lines)
            with pytest.raises(Crash):
                sc.run(job, statistics=tmp_path / "statistics")
        sc.run(job, resume=True)
        assert files(tmp_path / f"out-{lines}") == files(tmp_path / "whole")


@pytest.mark.parametrize("case", ["wanda", "slicegpt", "llm_pruner", "two streams"])
def test_what_entered_the_next_cut_block_must_be_there(case, dense, tmp_path, monkeypatch):
    job = recipe(dense, tmp_path / "out", CASES[case])
    with monkeypatch.context() as patch:
        crash_after(patch, 3)
        with pytest.raises(Crash):
            sc.run(job)
    states = list(run_path(tmp_path / "out").rglob("hidden/**/block-*.safetensors"))
    assert states
    for state in states:
        state.unlink()
    with pytest.raises(OutputError, match="the run can't go on: the hidden states behind its last finished block"):
        sc.run(job, resume=True)


def test_what_cannot_be_measured_in_the_end_loses_nothing(cli, dense, tmp_path, monkeypatch):
    asked = ["prune", dense, "--method", "wanda", "--sparsity", 0.5, "--samples", 4, "--length", 32]
    asked += ["--evaluate", "perplexity:builtin", "--windows", 2, "--no-report", "--out"]

    def broken(*arguments):
        raise NonFiniteError("the loss of model pruned is NaN")

    with monkeypatch.context() as patch:
        patch.setattr("secateur.evaluation.perplexity.Perplexity.measure", broken)
        run = cli(*asked, tmp_path / "out")
    assert run.code == 1 and "is NaN; " in run.err and "the same command with --resume goes on from there" in run.err
    assert cli(*asked, tmp_path / "out", "--resume").code == 0
    assert cli(*asked, tmp_path / "whole").code == 0
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "whole")]
    assert weights[0] == weights[1] and not run_path(tmp_path / "out").exists()


def test_a_folder_of_somebody_else_is_left_alone(dense, tmp_path):
    (tmp_path / "out.run").mkdir()
    (tmp_path / "out.run" / "precious").write_text("mine", encoding="utf8")
    with pytest.raises(
        OutputError, match=r"out\.run is where the run of .*out would be kept, and holds something else"
    ):
        sc.run(recipe(dense, tmp_path / "out", CASES["wanda"]), overwrite=True)
    assert (tmp_path / "out.run" / "precious").read_text(encoding="utf8") == "mine"


def test_other_versions_do_not_resume(stopped, monkeypatch):
    monkeypatch.setattr("secateur.runs.run.library_versions", lambda: {"torch": "1.0"})
    with pytest.raises(OutputError, match="its versions differs in "):
        sc.run(stopped, resume=True)


def test_an_unfinished_run_is_not_overwritten_by_accident(stopped, tmp_path):
    with pytest.raises(OutputError, match=r"out\.run holds an unfinished run: add --resume .*, or --overwrite"):
        sc.run(stopped)
    sc.run(stopped, overwrite=True)
    assert (tmp_path / "out" / "config.json").is_file() and not run_path(tmp_path / "out").exists()


def test_there_must_be_something_to_resume(dense, tmp_path):
    with pytest.raises(OutputError, match=r"there is nothing to resume: .*out\.run doesn't exist"):
        sc.run(recipe(dense, tmp_path / "out", CASES["wanda"]), resume=True)
    (tmp_path / "out.run").mkdir()
    (tmp_path / "out.run" / "run.json").write_text("{")
    with pytest.raises(OutputError, match=r"run\.json can't be read"):
        sc.run(recipe(dense, tmp_path / "out", CASES["wanda"]), resume=True)


def test_a_torn_line_is_dropped(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl")
    journal.add(block=0)
    with open(tmp_path / "journal.jsonl", "ab") as file:
        file.write(b'{"block": 1, "fin')
    again = Journal(tmp_path / "journal.jsonl")
    assert again.entries == [{"block": 0}]
    again.add(block=1)
    assert Journal(tmp_path / "journal.jsonl").of("block").keys() == {0, 1}


def test_an_error_before_anything_is_finished_leaves_nothing(dense, tmp_path):
    with pytest.raises(sc.SecateurError, match="windows"):
        sc.run(recipe(dense, tmp_path / "deep" / "out", CASES["wanda"], calibration={"samples": 10**6, "length": 256}))
    assert list(tmp_path.iterdir()) == []


def test_applying_a_plan_resumes_too(dense, tmp_path, monkeypatch):
    from secateur.runs.applying import apply_plans

    sc.run(recipe(dense, tmp_path / "whole", CASES["flap"]))
    plans = [sc.Plan.load(tmp_path / "whole" / "plan")]
    with monkeypatch.context() as patch:
        crash_after(patch, 3)
        with pytest.raises(Crash):
            apply_plans(plans, dense, tmp_path / "out")
    apply_plans(plans, dense, tmp_path / "out", resume=True)
    assert files(tmp_path / "out") == files(tmp_path / "whole")
