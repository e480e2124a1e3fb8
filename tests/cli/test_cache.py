"""``secateur cache``: tables, JSON, exit codes, and one sentence for what is wrong."""

from __future__ import annotations

import json

import pytest

from secateur.methods.cache.knorm import KeyNorm

SMALL = ["--prefix", 48, "--after", 8, "--windows", 2]


def test_compare_prints_a_table_and_resumes(cli, tiny_checkpoint, tmp_path):
    command = ["cache", "compare", tiny_checkpoint, "--presses", "knorm,keydiff,mustafar:block=8,window=8", *SMALL]
    command += ["--out", tmp_path / "out", "--speed", "40", "--repeats", 1, "--new", 2]
    run = cli(*command, "--ratios", "0.5")
    assert run.code == 0, run.err
    assert "knorm:0.5" in run.out and "mustafar:0.5,block=8,window=8" in run.out and "At 75% of the bytes" in run.out
    assert "prefill at 40" in run.out and "decode at 40" in run.out
    assert (tmp_path / "out" / "cache.html").is_file()
    again = cli(*command, "--ratios", "0.5", "--resume", "--json")
    document = json.loads(again.out)
    assert again.code == 0 and [row["spec"] for row in document["rows"]][1] == "knorm:0.5"
    assert cli(*command, "--ratios", "0.5").code == 1


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--out", "out"], 2, "name what is compared with --presses"),
        (["--presses", "knorm"], 2, "give a folder for the comparison with --out"),
        (["--presses", "knorm", "--out", "out", "--ratios", "half"], 2, "--ratios takes numbers"),
        (["--presses", "knorm", "--out", "out", "--ratios", ""], 2, "--ratios takes numbers"),
        (["--presses", "knorm", "--out", "out", "--held", ""], 2, "--held takes numbers"),
        (["--presses", "knorm", "--out", "out", "--ratios", "0.5", "--held", "0.5"], 2, "give one of them"),
        (["--presses", "knorm", "--out", "out", "--speed", "64,4k"], 2, "--speed takes whole numbers"),
        (["--presses", "knrm", "--out", "out"], 2, "unknown method 'knrm'; did you mean 'knorm'"),
        (["--presses", "knorm", "--out", "out", "--needle", "kv:length=100000"], 2, "beyond the 1024 positions"),
    ],
)
def test_compare_refuses_in_one_sentence(cli, tiny_checkpoint, tmp_path, monkeypatch, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    run = cli("cache", "compare", tiny_checkpoint, *SMALL, *arguments)
    assert run.code == code and message in run.err and "Traceback" not in run.err
    assert not (tmp_path / "out").exists()


def test_compare_says_what_failed(cli, tiny_checkpoint, tmp_path, monkeypatch):
    from secateur.errors import UnsupportedModelError

    def broken(self, prompt):
        raise UnsupportedModelError("not for that model")

    monkeypatch.setattr(KeyNorm, "score", broken)
    run = cli("cache", "compare", tiny_checkpoint, "--presses", "knorm:0.5", *SMALL, "--out", tmp_path / "out")
    assert run.code == 1 and "knorm:0.5 failed: not for that model" in run.err and "failed" in run.out


def test_recommend_from_shapes_and_from_a_text(cli, tiny_checkpoint):
    command = ["cache", "recommend", tiny_checkpoint, "--context", 200, "--memory", "24KB", "--dtype", "float16"]
    run = cli(*command)
    assert run.code == 0 and "take this" in run.out and "the first that fits" in run.out, run.err
    chosen = json.loads(cli(*command, "--json").out)
    assert chosen["bytes_dense"] == 200 * 2 * 2 * (8 + 8) * 2 and chosen["spec"] in run.out
    # float32, as stored
    command = [*command[:5], "--memory", "48KB"]
    measured = cli(*command, "--presses", "knorm,keydiff", "--text", "builtin", *SMALL)
    assert measured.code == 0 and "perplexity of the dense cache" in measured.out, measured.err
    assert cli(*command, "--dtype", "int3").code == 2
    assert cli("cache", "recommend", tiny_checkpoint, "--context", 200, "--memory", "1KB").code == 1
