import itertools
import json
import shutil

import pytest

from secateur.cli.evaluate import model_names
from secateur.errors import UsageError
from secateur.evaluation.speed import Speed
from secateur.evaluation.tasks import KINDS


def test_models_stand_side_by_side(cli, tiny_checkpoint, tmp_path, make_llama, tiny_tokenizer):
    other = tmp_path / "other"
    make_llama(seed=1).save_pretrained(other)
    tiny_tokenizer.save_pretrained(other)
    task = ("--task", "perplexity:builtin", "--windows", 2, "--length", 32)
    run = cli("evaluate", tiny_checkpoint, other, *task, "--json")
    assert run.code == 0, run.err
    table = json.loads(run.out)
    assert table["models"] == ["tiny", "other"]
    assert [metric["name"] for metric in table["metrics"]] == ["perplexity:builtin"]
    shown = cli("evaluate", tiny_checkpoint, other, *task)
    assert "tiny" in shown.out and "perplexity:builtin" in shown.out


def test_a_cut_model_that_decodes_slower_than_its_bytes_allow_is_explained(
    cli, tiny_checkpoint, tmp_path, make_llama, tiny_tokenizer, monkeypatch
):
    cut = tmp_path / "cut"
    make_llama(num_hidden_layers=1).save_pretrained(cut)
    tiny_tokenizer.save_pretrained(cut)
    # seconds of 8 tokens read, 4 written and the products of 4, in turns: 100 ms and 50 a token, and 90 and 40
    taken = itertools.cycle([(0.1, 0.4, 0.2), (0.1, 0.36, 0.16)])
    monkeypatch.setattr(Speed, "_time", lambda self, model, seed: next(taken))
    task = ("--task", "speed:prompt=8,new=4,repeats=2")
    found = cli("evaluate", tiny_checkpoint, cut, *task).out.splitlines()
    said = [line for line in found if line.startswith("Decoding is 1.11 times as fast, where reading fewer bytes")]
    assert len(said) == 1 and "products with weights took 50 and take 40 now, 1.25 times as fast" in said[0]
    assert "took 50 and takes 50." in said[0]
    assert "Decoding is" not in cli("evaluate", tiny_checkpoint, *task).out
    third = tmp_path / "third"
    shutil.copytree(cut, third)
    assert "Decoding is" not in cli("evaluate", tiny_checkpoint, cut, third, *task).out


def test_help_names_every_task(cli):
    said = cli("evaluate", "--help").out
    assert [kind for kind in KINDS if kind not in said] == []


def test_unknown_task_is_refused_before_loading(cli):
    run = cli("evaluate", "missing", "--task", "perplxity")
    assert (run.code, run.out) == (2, "") and "did you mean 'perplexity'?" in run.err


def test_missing_model(cli, tmp_path):
    run = cli("evaluate", tmp_path / "missing", "--task", "size", "--json")
    assert (run.code, run.out) == (1, "")
    assert "missing" in run.err and run.err.count("\n") == 1


def test_names_are_short_where_they_differ():
    assert model_names(["a/x", "b/y/"]) == ["x", "y"]
    assert model_names(["a/x", "b/x"]) == ["a/x", "b/x"]
    with pytest.raises(UsageError, match="a/x is given twice"):
        model_names(["a/x", "a/x"])
