"""Every ``--help`` shows one sentence and an example, and the examples run."""

import shlex

import pytest

from secateur.cli.examples import HELP

SWEEP = """
model: ./smollm2-135m
windows: 4
calibration: {samples: 4, length: 64}
sweep: {grid: {method: [wanda, flap], sparsity: [0.2, 0.5]}}
"""
TRAIN = """
model: {name: perceptron, options: {sizes: [64, 16, 10]}}
data: {images: "sklearn:digits?split=train", test: "sklearn:digits"}
steps: 4
sparsifier: {method: gmp, sparsity: 0.5, every: 1}
"""
LOTTERY = f"{TRAIN.rpartition('sparsifier')[0]}lottery: {{levels: 2, controls: [shuffle]}}\n"
NET = """
import torch
from torch import nn

STEPS = 20


def network():
    return nn.Linear(8, 2)


def train(net, run):
    order = torch.Generator().manual_seed(run.seed)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in run.steps(STEPS):
        x = torch.randn(16, 8, generator=order)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), (x[:, 0] > 0).long()).backward()
        optimizer.step()


def accuracy(net):
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    return {"accuracy": 100 * (net(x).argmax(1) == (x[:, 0] > 0)).float().mean().item()}
"""


@pytest.mark.parametrize("command", HELP)
def test_help_shows_sentence_and_example(cli, command):
    run = cli(*command.split(), "--help")
    sentence, example = HELP[command]
    assert run.code == 0
    assert sentence in " ".join(run.out.split()) and sentence.count(".") == 1
    assert f"Example:\n    {example}\n" in run.out
    assert example.startswith(f"secateur {command} ")


def test_examples_are_one_session(cli, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2-135m").symlink_to(tiny_checkpoint)
    # a folder that stands for the built-in model; merging needs a second plan, for other parts
    sparse = cli(
        "prune", "./smollm2-135m", "--method", "magnitude", "--sparsity", 0.5, "--out", "sparse", "--no-report"
    )
    assert sparse.code == 0, sparse.err
    (tmp_path / "sweep.yaml").write_text(SWEEP, encoding="utf8")
    (tmp_path / "train.yaml").write_text(TRAIN, encoding="utf8")
    (tmp_path / "lottery.yaml").write_text(LOTTERY, encoding="utf8")
    (tmp_path / "net.py").write_text(NET, encoding="utf8")
    for _, example in HELP.values():
        words = ["./smollm2-135m" if word == "smollm2-135m" else word for word in shlex.split(example)[1:]]
        run = cli(*words)
        assert run.code == 0, f"{example}: {run.err}"
        assert run.out
    assert (tmp_path / "pruned" / "report.html").is_file()
    assert (tmp_path / "merged" / "plan.json").is_file()
    assert (tmp_path / "sweep" / "sweep.html").is_file()
