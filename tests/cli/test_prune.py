import json
from pathlib import Path

import pytest
import torch

from secateur import api
from secateur.plans import Plan

QUICK = ("--samples", 4, "--length", 32, "--no-report")


@pytest.fixture
def no_loading(monkeypatch):
    """Loading a model is a failure: whatever is wrong must be said before."""

    def load(*arguments, **options):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(api, "load", load)
    monkeypatch.setattr("secateur.runs.run.open_source", load)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["m"], "--method"),
        (["m", "--method", "flap"], "--out"),
        (["--method", "flap", "--dry-run"], "name a model"),
        (["m", "--method", "flpa", "--dry-run"], "did you mean 'flap'?"),
        (["m", "--method", "flap", "--sparsity", "1.3", "--dry-run"], "sparsity must lie in [0, 1), got 1.3"),
        (["m", "--method", "flap", "--ratio", "nan", "--dry-run"], "sparsity must lie in [0, 1), got nan"),
        (["m", "--method", "wanda", "--pattern", "4:2", "--dry-run"], "0 < N < M"),
        (["m", "--method", "flap", "--pattern", "2:4", "--dry-run"], "pattern"),
        (["m", "--method", "wanda", "--pattern", "2:4", "--sparsity", "0.3", "--dry-run"], "contradicts pattern 2:4"),
        (["m", "--method", "flap", "--budget", "parms", "--dry-run"], "did you mean 'params'?"),
        (["m", "--method", "flap", "--set", "min_kep=2", "--dry-run"], "did you mean 'min_keep'?"),
        (["m", "--method", "flap", "--set", "min_keep", "--dry-run"], "KEY=VALUE"),
        (["m", "--method", "flap", "--set", "min_keep=1", "--set", "min_keep=2", "--dry-run"], "given twice"),
        (["m", "--method", "flap", "--set", "min_keep=few", "--dry-run"], "min_keep must be of type int"),
        (["m", "--method", "flap", "--sparsity", "0.1", "--set", "sparsity=0.2", "--dry-run"], "given twice"),
        (["m", "--method", "flap", "--samples", "0", "--dry-run"], "calibration.samples"),
        (["m", "--method", "flap", "--dtype", "float8", "--dry-run"], "dtype"),
        (["m", "--method", "flap", "--format", "zip", "--dry-run"], "format"),
        (["m", "--method", "flap", "--evaluate", "perplxity", "--dry-run"], "did you mean 'perplexity'?"),
        (["m", "--method", "flap", "--sparsity", "much", "--dry-run"], "--sparsity"),
        (["m", "--metod", "flap"], "--method"),
        (["m", "--method", "wanda", "--allocate", "owll", "--dry-run"], "did you mean 'owl'?"),
        (["m", "--method", "wanda", "--allocate", "owl:lam=2", "--dry-run"], "owl: lam must lie in [0, 1]"),
        (["m", "--method", "flap", "--allocate", "owl", "--dry-run"], "flap removes heads and neurons"),
    ],
)
def test_misuse_is_one_line_and_code_2_before_anything_is_loaded(cli, no_loading, arguments, said):
    run = cli("prune", *arguments)
    assert run.code == 2
    assert run.out == ""
    assert run.err.startswith("error: ") and run.err.count("\n") == 1
    assert said in run.err


def test_output_that_exists_is_refused_before_anything_is_loaded(cli, no_loading, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    run = cli("prune", "m", "--method", "flap", "--out", tmp_path / "out")
    assert run.code == 1
    assert "--overwrite" in run.err
    assert (tmp_path / "out" / "precious").read_text() == "x"


def test_dry_run_shows_the_plan_and_writes_nothing(cli, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = cli("prune", tiny_checkpoint, "--method", "magnitude_sp", "--sparsity", 0.5, *QUICK, "--dry-run")
    assert run.code == 0, run.err
    assert "magnitude_sp" in run.out
    assert list(tmp_path.iterdir()) == []


def test_an_allocator_is_shown_with_what_it_chose(cli, tiny_checkpoint, tmp_path):
    out = tmp_path / "out"
    arguments = ("--method", "wanda", "--sparsity", 0.5, "--allocate", "owl:m=2", *QUICK, "--no-report", "--out", out)
    made = cli("prune", tiny_checkpoint, *arguments)
    assert made.code == 0, made.err
    shown = cli("plan", "show", out).out
    assert "allocation: owl:lam=0.08,lam_pattern=2.0,m=2.0: matrices lose 4" in shown
    report = json.loads((out / "report.json").read_text(encoding="utf8"))
    assert report["options"]["allocate"] == "owl:lam=0.08,lam_pattern=2.0,m=2.0"
    (plan,) = json.loads(cli("plan", "show", out, "--json").out)["plans"]
    given = plan["provenance"][0]["allocation"]["sparsities"]
    assert given == {name.removesuffix(".weight"): mask["sparsity"] for name, mask in plan["masks"].items()}


def test_dry_run_as_json_counts_what_would_go(cli, tiny_checkpoint):
    run = cli("prune", tiny_checkpoint, "--method", "wanda", "--sparsity", 0.5, *QUICK, "--dry-run", "--json")
    (plan,) = json.loads(run.out)["plans"]
    assert plan["method"] == "wanda"
    assert {mask["sparsity"] for mask in plan["masks"].values()} == {0.5}


def test_json_is_the_only_thing_on_stdout_and_quiet_silences_progress(cli, tiny_checkpoint, tmp_path, monkeypatch):
    evaluate = api.evaluate

    def noisy(*arguments, **options):
        print("a library that talks")
        return evaluate(*arguments, **options)

    monkeypatch.setattr(api, "evaluate", noisy)
    out = tmp_path / "out"
    run = cli(
        "prune", tiny_checkpoint, "--method", "flap", "--sparsity", 0.2, *QUICK, "--out", out, "--json", "--quiet"
    )
    assert run.code == 0, run.err
    document = json.loads(run.out)
    assert document["output"] == str(out)
    assert document["method"] == "flap"
    assert any(metric["name"].startswith("parameters") for metric in document["metrics"])
    assert run.err == "a library that talks\n"


def test_checkpoint_holds_plan_report_and_page_and_loads(cli, tiny_checkpoint, tmp_path):
    out = tmp_path / "out"
    run = cli(
        "prune", tiny_checkpoint, "--method", "magnitude", "--sparsity", 0.5, "--out", out, "--prompt", "The",
        "--evaluate", "perplexity:builtin", "--windows", 2, "--length", 32, "--samples", 2,
    )  # fmt: skip
    assert run.code == 0, run.err
    assert "from_pretrained" in run.out and "perplexity:builtin" in run.out and "dense: The" in run.out
    assert {"plan", "report.json", "report.html", "config.json", "README.md"} <= {p.name for p in out.iterdir()}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    report = json.loads((out / "report.json").read_text())
    assert report["output"] == str(out) and report["plain"] is True
    assert set(report["samples"][0]["outputs"]) == {"dense", "pruned"}
    assert 'from_pretrained("out"' in (out / "README.md").read_text()
    model, _ = api.load(out)
    weight = model.model.layers[0].mlp.up_proj.weight
    assert float((weight == 0).float().mean()) == pytest.approx(0.5, abs=0.01)


def test_general_options_reach_the_run(cli, monkeypatch):
    seen = []

    def run(recipe, options):
        seen.append((recipe, options))
        raise KeyboardInterrupt

    monkeypatch.setattr("secateur.runs.run.run_recipe", run)
    cli(
        "prune", "m", "--method", "flap", "--ratio", 0.3, "--budget", "macs", "--calibration", "text.jsonl",
        "--samples", 3, "--length", 33, "--seed", 5, "--text-field", "body", "--dtype", "bfloat16",
        "--set", "min_keep=2", "--out", "new", "--max-shard-size", "1GB", "--activation-memory", "2GB", "--resume",
    )  # fmt: skip
    ((recipe, options),) = seen
    assert options.resume and not options.overwrite
    assert recipe.model_dump(exclude_defaults=True) == {
        "model": "m",
        "out": "new",
        "dtype": "bfloat16",
        "max_shard_size": "1GB",
        "activation_memory": "2GB",
        "calibration": {"source": "text.jsonl", "samples": 3, "length": 33, "seed": 5, "text_field": "body"},
        "steps": [{"method": "flap", "sparsity": 0.3, "budget": "macs", "options": {"min_keep": "2"}}],
    }


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_command_line_overrides_the_recipe(cli, tiny_checkpoint, tmp_path):
    recipe = write(
        tmp_path / "r.yaml",
        f"model: {tiny_checkpoint}\ncalibration: {{samples: 2, length: 32}}\n"
        "steps: [{method: wanda, pattern: 2:4, options: {use_variant: false}}]\n",
    )
    run = cli("prune", "--recipe", recipe, "--sparsity", 0.25, "--samples", 3, "--dry-run", "--json")
    assert run.code == 0, run.err
    (plan,) = json.loads(run.out)["plans"]
    assert {mask["sparsity"] for mask in plan["masks"].values()} == {0.25}
    assert plan["provenance"][0]["calibration"]["samples"] == 3
    assert plan["provenance"][0]["calibration"]["length"] == 32


def test_steps_follow_each_other(cli, tiny_checkpoint, tmp_path):
    recipe = write(
        tmp_path / "r.yaml",
        f"model: {tiny_checkpoint}\nout: {tmp_path / 'out'}\ncalibration: {{samples: 2, length: 32}}\n"
        "steps:\n- {method: magnitude_sp, sparsity: 0.5}\n- {method: magnitude, sparsity: 0.5}\n",
    )
    run = cli("prune", "--recipe", recipe, "--no-report", "--json")
    assert run.code == 0, run.err
    report = json.loads(run.out)
    assert report["method"] == "magnitude_sp+magnitude"
    assert report["achieved"] == pytest.approx(0.75, abs=0.05)
    shown = json.loads(cli("plan", "show", tmp_path / "out", "--json").out)["plans"]
    assert [plan["method"] for plan in shown] == ["magnitude_sp", "magnitude"]
    again = tmp_path / "again"
    assert cli("plan", "apply", tmp_path / "out", tiny_checkpoint, "--out", again).code == 0
    first, second = (api.load(folder)[0].state_dict() for folder in (tmp_path / "out", again))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_steps_of_a_recipe_are_not_changed_from_the_command_line(cli, no_loading, tmp_path):
    recipe = write(tmp_path / "r.yaml", "model: m\nsteps: [{method: flap}, {method: wanda}]\n")
    run = cli("prune", "--recipe", recipe, "--sparsity", 0.1, "--dry-run")
    assert run.code == 2
    assert "has 2 steps" in run.err


def test_bad_option_of_a_step_names_the_step(cli, no_loading, tmp_path):
    recipe = write(tmp_path / "r.yaml", "model: m\nsteps: [{method: flap}, {method: wanda, options: {x: 1}}]\n")
    run = cli("prune", "--recipe", recipe, "--dry-run")
    assert run.code == 2
    assert "step 2: wanda has no option 'x'" in run.err


def test_a_refit_from_the_command_line(cli, tiny_checkpoint, tmp_path):
    out = tmp_path / "out"
    asked = ("--method", "magnitude", "--sparsity", 0.5, "--heal", "refit", "--target", "dense", *QUICK, "--out", out)
    run = cli("prune", tiny_checkpoint, *asked, "--no-measure")
    assert run.code == 0, run.err
    plan = Plan.load(out / "plan")
    assert (plan.provenance[0].options["heal"], plan.provenance[0].options["target"]) == ("refit", "dense")
    assert set(plan.values) == set(plan.masks) and plan.provenance[0].calibration
    assert {finding.status for finding in api.verify(out, tiny_checkpoint)} <= {"passed", "not checked"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--method", "wanda", "--heal", "bias"], "heal must be one of none, refit, got 'bias'"),
        (["--method", "flap", "--heal", "refitt"], "did you mean 'refit'?"),
        (["--method", "flap", "--target", "past"], "target must be one of current, stream, dense"),
        (["--method", "shortgpt", "--heal", "refit"], "shortgpt takes no heal"),
        (["--method", "flap", "--heal", "bias", "--set", "heal=refit"], "given twice"),
    ],
)
def test_a_repair_that_is_not_possible_is_refused(cli, no_loading, arguments, said):
    run = cli("prune", "m", *arguments, "--dry-run")
    assert (run.code, run.err.count("\n")) == (2, 1)
    assert said in run.err


def test_a_link_stays_a_link(cli, tiny_checkpoint, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    asked = ("prune", tiny_checkpoint, "--method", "magnitude", "--no-measure", *QUICK, "--quiet", "--out")
    for more in ([], ["--overwrite"]):
        run = cli(*asked, tmp_path / "link", *more)
        assert run.code == 0, run.err
        assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "config.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


def test_the_working_folder_is_no_output(cli, tiny_checkpoint, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for out in (".", "..", tmp_path / "here"):
        run = cli("prune", tiny_checkpoint, "--method", "magnitude", *QUICK, "--out", out, "--overwrite")
        assert run.code == 1 and "is the folder that you are in" in run.err
        run = cli("convert", tiny_checkpoint, "--out", out, "--overwrite")
        assert run.code == 1 and "is the folder that you are in" in run.err
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_layers_of_their_own_sizes_are_pruned_again(cli, tiny_checkpoint, tmp_path):
    quick = (*QUICK, "--no-measure", "--quiet")
    run = cli("prune", tiny_checkpoint, "--method", "flap", "--sparsity", 0.3, *quick, "--out", tmp_path / "cut")
    assert run.code == 0, run.err
    again = ("--method", "wanda", "--sparsity", 0.5)
    run = cli("prune", tmp_path / "cut", *again, *quick, "--out", tmp_path / "twice")
    assert run.code == 0, run.err
    assert cli("estimate", tmp_path / "cut", *again).code == 0


def test_a_model_with_few_positions_still_writes_its_sentence(cli, make_llama, tiny_tokenizer, tmp_path):
    from families import make_tiny

    model = make_tiny("opt", vocab_size=512, max_position_embeddings=40)
    api.save(model, tiny_tokenizer, tmp_path / "opt")
    asked = ("--method", "wanda", "--sparsity", 0.5, "--samples", 2, "--length", 32, "--prompt", "one two three " * 40)
    run = cli("prune", tmp_path / "opt", *asked, "--no-report", "--out", tmp_path / "out")
    assert run.code == 0, run.err
    (sample,) = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf8"))["samples"]
    assert set(sample["outputs"]) == {"dense", "pruned"}


@pytest.mark.parametrize(
    ("text", "said"),
    [("only three words", "fewer than one window of 32"), (None, "does not exist")],
)
def test_text_that_cannot_be_measured_on_is_said_first(cli, tiny_checkpoint, tmp_path, text, said):
    path = tmp_path / "text.txt"
    if text:
        path.write_text(text, encoding="utf8")
    asked = ("--method", "magnitude", "--evaluate", f"perplexity:{path}", *QUICK, "--out", tmp_path / "out")
    run = cli("prune", tiny_checkpoint, *asked)
    assert run.code == 1 and said in run.err and "prune" not in run.err
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.run").exists()


def test_a_harness_task_whose_data_are_missing_is_said_first(cli, tiny_checkpoint, tmp_path):
    task = tmp_path / "mine.yaml"
    task.write_text(
        f"""
task: mine
dataset_path: json
dataset_kwargs: {{data_files: {tmp_path}/missing.jsonl, cache_dir: {tmp_path}/cache}}
test_split: train
output_type: multiple_choice
doc_to_text: question
doc_to_choice: ["a", "b"]
doc_to_target: answer
""",
        encoding="utf8",
    )
    asked = ("--method", "magnitude", "--evaluate", f"lm_eval:{task}", *QUICK, "--out", tmp_path / "out")
    run = cli("prune", tiny_checkpoint, *asked)
    assert run.code == 1 and "lm_eval:mine.yaml can't be run: " in run.err and run.err.count("\n") == 1
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.run").exists()
