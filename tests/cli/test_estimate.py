import json
import shutil

import pytest

from secateur.tensorfiles import Stored

QUICK = ("--samples", 4, "--length", 32)


@pytest.fixture
def no_reading(monkeypatch):
    """Reading a weight is a failure."""

    def read(*arguments):
        raise AssertionError("a weight was read")

    monkeypatch.setattr(Stored, "read_flat", read)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "flap", "shortgpt"])
def test_no_weight_is_read(cli, tiny_checkpoint, tmp_path, monkeypatch, no_reading, method):
    monkeypatch.chdir(tmp_path)
    run = cli("estimate", tiny_checkpoint, "--method", method, *QUICK, "--out", "out")
    assert run.code == 0, run.err
    assert "where it goes" in run.out and "process" in run.out and "checkpoint" in run.out
    assert run.err == ""
    assert list(tmp_path.iterdir()) == []


def test_json_is_one_document_with_parts_and_sums(cli, tiny_checkpoint):
    run = cli("estimate", tiny_checkpoint, "--method", "sparsegpt", *QUICK, "--dtype", "float32", "--json")
    found = json.loads(run.out)
    step = found["steps"][0]
    assert found["memory_bytes"] == sum(step["memory"].values()) > 10**7
    assert found["disk_bytes"] == sum(step["disk"].values())
    assert found["flops"] == sum(step["flops"].values())
    assert found["seconds"] == pytest.approx(found["startup"] + sum(step["seconds"].values()))
    assert found["bytes_before"] == found["bytes_after"] and found["speed_bound"] == 1
    assert (found["fits_memory"], found["problem"], found["dtype"]) == (True, "", "float32")


def test_a_config_alone_is_enough(cli, tiny_checkpoint, tmp_path):
    shutil.copy(tiny_checkpoint / "config.json", tmp_path)
    whole, described = (
        json.loads(cli("estimate", f, "--method", "wanda", *QUICK, "--dtype", "float32", "--json").out)
        for f in (tiny_checkpoint, tmp_path)
    )
    for key in ("disk", "flops"):
        assert whole["steps"][0][key] == described["steps"][0][key]
    assert whole["bytes_before"] == described["bytes_before"]


def test_a_recipe_is_estimated_as_a_whole(cli, tiny_checkpoint, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {tiny_checkpoint}\nsteps: [{{method: flap}}, {{method: magnitude}}]\n")
    run = cli("estimate", "--recipe", recipe, *QUICK)
    assert run.code == 0, run.err
    assert "flap: where it goes" in run.out and "magnitude: where it goes" in run.out


def test_stages_are_steps_and_a_policy_takes_no_years(cli, tiny_checkpoint):
    how = ("--stages", 3, "--heal", "lora:steps=6,batch=1,length=32")
    staged = json.loads(cli("estimate", tiny_checkpoint, "--method", "adapt_pruner", *how, *QUICK, "--json").out)
    assert [step["method"] for step in staged["steps"]] == ["adapt_pruner"] * 3
    policy = json.loads(cli("estimate", tiny_checkpoint, "--method", "prunenet", "--json").out)
    # operations, but no text
    assert set(policy["steps"][0]["flops"]) == {"solving"} and 0 < policy["steps"][0]["seconds"]["decide"] < 60


def test_too_little_memory_is_refused_with_what_there_is_shown(cli, tiny_checkpoint):
    run = cli("estimate", tiny_checkpoint, "--method", "magnitude", "--memory", "1MB", "--json")
    assert run.code == 1
    assert run.err.startswith("error: pruning ") and run.err.count("\n") == 1
    assert "1.0 MB are there: no option makes it fit" in run.err
    assert json.loads(run.out)["fits_memory"] is False


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["m"], "--method"),
        (["--method", "flap"], "name a model"),
        (["m", "--method", "flpa"], "did you mean 'flap'?"),
        (["m", "--method", "flap", "--memory", "much"], "a size is a number with a unit"),
        (["m", "--method", "flap", "--activation-memory", "much"], "a size is a number with a unit"),
    ],
)
def test_misuse_is_one_line_and_code_2(cli, arguments, said):
    run = cli("estimate", *arguments)
    assert (run.code, run.out) == (2, "")
    assert run.err.startswith("error: ") and run.err.count("\n") == 1 and said in run.err


def test_a_folder_without_a_model_is_refused(cli, tmp_path):
    run = cli("estimate", tmp_path, "--method", "wanda")
    assert run.code == 1
    assert "holds no model: there is no config.json in it" in run.err


def prune(cli, folder, out, *arguments):
    return cli("prune", folder, "--method", "wanda", *QUICK, "--no-report", "--no-measure", "--out", out, *arguments)


def test_prune_says_it_first(cli, tiny_checkpoint, tmp_path):
    run = prune(cli, tiny_checkpoint, tmp_path / "out")
    assert run.code == 0, run.err
    first = run.err.splitlines()[0]
    assert first.startswith("estimate: ") and " of memory, " in first and " of disk, about " in first
    for option in ("--no-estimate", "--quiet"):
        assert "estimate:" not in prune(cli, tiny_checkpoint, tmp_path / option, option).err


def heal(cli, folder, out, *arguments):
    return cli("heal", folder, "--steps", 1, "--batch", 1, "--length", 16, "--no-report", "--out", out, *arguments)


def test_heal_says_it_first_and_refuses_what_cant_fit(cli, tiny_checkpoint, tmp_path, monkeypatch):
    # of the training, not of loading: nobody waits for an option that is wrong
    refused = heal(cli, tiny_checkpoint, tmp_path / "out", "--set", "targets=o_porj")
    assert refused.code == 2 and "did you mean 'o_proj'?" in refused.err and "estimate: " not in refused.err
    run = heal(cli, tiny_checkpoint, tmp_path / "out", "--teacher", tiny_checkpoint)
    assert run.code == 0, run.err
    assert run.err.splitlines()[0].startswith("estimate: ") and " of memory, " in run.err.splitlines()[0]
    monkeypatch.setattr("secateur.estimate.build.available_memory", lambda: 0)
    run = heal(cli, tiny_checkpoint, tmp_path / "other")
    assert run.code == 1 and run.err.startswith("error: training ") and run.err.count("\n") == 1
    assert not (tmp_path / "other").exists()
    assert heal(cli, tiny_checkpoint, tmp_path / "other", "--no-estimate").code == 0


def test_prune_refuses_what_cant_fit_before_any_work(cli, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("secateur.estimate.build.available_memory", lambda: 0)
    run = prune(cli, tiny_checkpoint, tmp_path / "out")
    assert run.code == 1
    assert run.err.startswith("error: pruning ") and run.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
    # who knows better may go on
    assert prune(cli, tiny_checkpoint, tmp_path / "out", "--no-estimate").code == 0


def test_prune_refuses_a_disk_that_is_too_small(cli, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("secateur.estimate.build.free_disk", lambda place: 1000)
    run = prune(cli, tiny_checkpoint, tmp_path / "out")
    assert run.code == 1 and "of disk, and 1.0 kB are free" in run.err
    assert list(tmp_path.iterdir()) == []
