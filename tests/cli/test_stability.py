"""``secateur stability`` on a small network of the user's own file."""

from __future__ import annotations

import json

import pytest

NET = """
import torch
from torch import nn

x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
y = (x[:, 0] > 0).long()


def network():
    return nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))


def train(net, run):
    order = torch.Generator().manual_seed(run.seed)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in run.steps(12):
        index = torch.randint(len(x), (16,), generator=order)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x[index]), y[index]).backward()
        optimizer.step()


def evaluate(net):
    right = (net(x).argmax(1) == y).float().mean().item()
    return {"loss": nn.functional.cross_entropy(net(x), y).item(), "accuracy": 100 * right}


def batches():
    return x.split(16)


def fails(net, run):
    return 1 / 0
"""


@pytest.fixture
def command(cli, tmp_path, monkeypatch, forget_plugins):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NET, encoding="utf8")
    return lambda *more, train="train": cli(
        "stability", "net.py:network", "--train", f"net.py:{train}", "--evaluate", "net.py:evaluate", *more
    )


def test_table_document_and_page(command, tmp_path):
    options = ("--at", "0,33%", "--length", 12, "--points", 5, "--data", "net.py:batches")
    run = command(*options, "--out", "stable")
    assert run.code == 0, run.err
    assert "accuracy of both" in run.out and "stability.html are in stable" in " ".join(run.out.split())
    told = json.loads((tmp_path / "stable/results.json").read_text(encoding="utf8"))
    assert [one["step"] for one in told["steps"]] == [0, 4] and told["metric"] == "accuracy"
    for one in told["steps"]:
        values = one["curves"]["accuracy"]["values"]
        assert len(values) == 5
        assert one["barriers"]["accuracy"] == pytest.approx((values[0] + values[-1]) / 2 - min(values))
    page = (tmp_path / "stable/stability.html").read_text(encoding="utf8")
    assert "on the line between two copies" in page and "step 4" in page
    # a folder goes on, and gives the same numbers
    again = command(*options, "--out", "stable", "--resume", "--json", "--metric", "loss")
    assert json.loads(again.out)["steps"] == told["steps"] and json.loads(again.out)["metric"] == "loss"
    assert command(*options, "--out", "stable").code == 1


@pytest.mark.parametrize(
    ("more", "train", "words"),
    [
        (("--at", "soon"), "train", "--at must be a step (500) or a part of the training (3%), got 'soon'"),
        ((), "trian", "did you mean 'train'"),
        ((), "x", "must be a function, got"),
        ((), "fails", "net.py:fails failed: ZeroDivisionError"),
        (("--at", "5%"), "train", "give its length with --length"),
        (("--at", "99"), "train", "step 99 is gone back to, but the training has 12 steps"),
        (("--data", "net.py:batches", "--points", 2, "--metric", "auc"), "train", "--metric must be one"),
        (("--masks", "nowhere"), "train", "nowhere"),
    ],
)  # fmt: skip
def test_what_is_asked_wrongly_is_one_sentence(command, more, train, words):
    run = command(*more, train=train)
    assert run.code in (1, 2) and words in run.err and "Traceback" not in run.err


def test_norms_need_data_or_a_decision(command):
    run = command("--points", 2)
    assert run.code == 1 and "give data= (batches of the training)" in run.err
    assert command("--points", 2, "--statistics", "interpolate").code == 0
