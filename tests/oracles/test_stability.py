"""Oracles of stability: lines, distances, barriers by hand, and copies that agree when they must."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import secateur as sc
from lotteries import STEPS, accuracy, network, train
from secateur.errors import DataError, NonFiniteError, UsageError
from secateur.rounds import Run, connect, distance, interpolate
from sparse_training import batch


def states(*values: float) -> list[dict[str, torch.Tensor]]:
    return [{"w": torch.tensor([v, -v]), "steps": torch.tensor(i)} for i, v in enumerate(values)]


def test_lines():
    first, second = states(1.0, 5.0)
    assert interpolate(first, second, 0.25)["w"].tolist() == [4.0, -4.0]
    # counters belong to the first
    assert interpolate(first, second, 0.25)["steps"] == 0
    for alpha, end in ((1.0, first), (0.0, second)):
        assert torch.equal(interpolate(first, second, alpha)["w"], end["w"])
    with pytest.raises(UsageError, match="w isn't the same in both"):
        interpolate(first, {"w": torch.ones(3), "steps": torch.tensor(0)}, 0.5)


def test_distances():
    one = {"w": torch.tensor([3.0, 4.0]), "v": torch.tensor([0.0])}
    assert distance(one, one) == sc.rounds.Distance(0.0, 0.0)
    found = distance(one, {n: -t for n, t in one.items()})
    assert found.l2 == pytest.approx(10.0) and found.angle == pytest.approx(math.pi)
    quarter = distance(one, {"w": torch.tensor([-4.0, 3.0]), "v": torch.tensor([0.0])})
    assert quarter.angle == pytest.approx(math.pi / 2)
    masked = distance(
        one, {"w": torch.tensor([3.0, 0.0]), "v": torch.tensor([9.0])}, {"w": torch.tensor([True, False])}
    )
    assert masked.l2 == 0 and masked.angle == 0


class Two(nn.Module):
    """y = v . relu(W x)"""

    def __init__(self, w: torch.Tensor, v: torch.Tensor) -> None:
        super().__init__()
        self.w, self.v = nn.Parameter(w.clone()), nn.Parameter(v.clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x @ self.w.T) @ self.v


def test_permuted_neurons_are_not_aligned():
    w, v = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([1.0, -1.0])
    first, second = Two(w, v), Two(w.flip(0), v.flip(0))
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0]])

    def error(net):
        return {"loss": float((net(x) - first(x)).square().mean())}

    curve = connect(first, second, error, points=5)["loss"]
    # both are the same function, and the middle of both is 0 everywhere
    assert curve.values[0] == curve.values[-1] == 0 and curve.alphas == (0.0, 0.25, 0.5, 0.75, 1.0)
    assert curve.barrier == curve.values[2] == pytest.approx(1.0)


def test_copies_in_one_order_have_no_barrier():
    found = sc.instability(network, train, accuracy, orders=(3, 3), points=5, data=[batch(0)])
    [one] = found.found
    assert one.barriers == {"accuracy": 0.0} and (one.l2, one.angle) == (0.0, 0.0) and found.onset() == 0


def test_the_ends_of_the_line_are_the_copies():
    kept = []

    def fit(net, run):
        train(net, run)
        kept.append(net)

    found = sc.instability(network, fit, accuracy, at=(0, 2), points=4, data=[batch(0)], length=STEPS)
    assert len(kept) == 5 and [one.step for one in found.found] == [0, 2]
    # those from step 2: the training until there, and both copies
    _, first, second = kept[2:]
    for net, value in (
        (second, found[2].curves["accuracy"].values[0]),
        (first, found[2].curves["accuracy"].values[-1]),
    ):
        norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
        sc.rounds.connecting.recompute_statistics(net, norms, [batch(0)])
        assert accuracy(net.eval()) == {"accuracy": value}
    assert found[2].l2 == pytest.approx(distance(dict(first.named_parameters()), dict(second.named_parameters())).l2)


def test_convex_problems_are_stable():
    """Logistic regression with weight decay, trained until it is at its only optimum whatever the order."""
    x = torch.randn(24, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = (x[:, 0] > 0.2).double()

    def loss(net):
        return F.binary_cross_entropy_with_logits(net(x)[:, 0], y) + 0.05 * net.weight.square().sum()

    def fit(net, run):
        # far apart at first: the order is a walk of random steps
        walk = torch.Generator().manual_seed(run.seed)
        optimizer = torch.optim.LBFGS(net.parameters(), max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-14)

        def closure():
            optimizer.zero_grad()
            value = loss(net)
            value.backward()
            return value

        with torch.no_grad():
            net.weight.add_(torch.randn(net.weight.shape, generator=walk, dtype=torch.float64))
        optimizer.step(closure)

    found = sc.instability(lambda: nn.Linear(3, 1).double(), fit, lambda net: {"loss": float(loss(net))}, points=9)
    assert abs(found[0].barriers["loss"]) < 1e-6


def test_statistics_of_norms_are_taken_again():
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(2)
    first, second = nn.Sequential(norm), nn.Sequential(nn.BatchNorm1d(2))
    norm.running_mean.fill_(100.0)
    batches = [torch.randn(8, 2) + 3, torch.randn(8, 2) + 5]
    seen = []

    def look(net):
        seen.append((net[0].running_mean.clone(), net[0].running_var.clone(), net[0].momentum, net.training))
        return 0.0

    connect(first, second, look, points=3, data=batches)
    means = torch.stack([b.mean(0) for b in batches]).mean(0)
    variances = torch.stack([b.var(0) for b in batches]).mean(0)
    for mean, variance, momentum, training in seen:
        assert torch.allclose(mean, means) and torch.allclose(variance, variances)
        assert momentum == 0.1 and not training
    seen.clear()
    connect(first, second, look, points=3, statistics="interpolate")
    assert [float(mean[0]) for mean, *_ in seen] == [0.0, 50.0, 100.0] and float(norm.running_mean[0]) == 100
    with pytest.raises(DataError, match="has batch norms"):
        connect(first, second, look)


def test_masks_hold_in_both_copies(tmp_path):
    rounds = sc.rounds.Rounds(network, train, levels=1, rate=0.5)
    rounds.level(1)
    kept = []

    def fit(net, run):
        train(net, run)
        kept.append(net)

    found = sc.instability(network, fit, accuracy, masks=rounds.plan(1), points=2, data=[batch(0)])
    masks = rounds.masks(1)
    assert len(kept) == 2 and all(not net.get_parameter(n)[~m].any() for net in kept for n, m in masks.items())
    first, second = (dict(net.named_parameters()) for net in kept)
    assert found[0].l2 == pytest.approx(distance(first, second, masks).l2)


def test_the_step_from_which_training_is_stable():
    def one(step: int, barrier: float) -> sc.rounds.Instability:
        curve = sc.rounds.Curve("accuracy", (0.0, 0.5, 1.0), (90.0, 91.0 - barrier, 92.0), True)
        return sc.rounds.Instability(step, {"accuracy": curve}, 1.0, 1.0)

    found = sc.rounds.Stability((one(0, 30.0), one(5, 1.0), one(9, 3.0), one(20, 1.9), one(50, 0.0)))
    assert (
        found[0].barriers == {"accuracy": pytest.approx(30.0)} and found.onset() == 20 and found.onset(within=5.0) == 5
    )
    assert found.onset(within=0.5) is None or found.onset(within=0.5) == 50


def test_a_folder_goes_on(tmp_path):
    calls = []

    def fit(net, run):
        calls.append(run)
        return train(net, run)

    options = {"points": 3, "data": [batch(0)], "length": STEPS, "folder": tmp_path / "stable"}
    sc.instability(network, fit, accuracy, at=(0,), **options)
    whole = sc.instability(network, fit, accuracy, at=(0, 2), resume=True, **options)
    assert len(calls) == 2 + 3
    # no training any more
    again = sc.instability(network, None, accuracy, at=(0, 2), resume=True, **options)
    assert again == whole
    with pytest.raises(UsageError, match="another points"):
        sc.instability(network, fit, accuracy, at=(0,), resume=True, **options | {"points": 5})
    other = sc.instability(network, fit, accuracy, at=(0,), overwrite=True, **options | {"points": 5})
    assert len(other[0].curves["accuracy"].values) == 5 and not (tmp_path / "stable/step-000002.json").exists()


def test_what_is_asked_wrongly_is_refused():
    def alike(net, run):
        return train(net, Run(first_step=run.first_step, last_step=run.last_step))

    data = [batch(0)]
    for fit, options, words in (
        (alike, {}, "both copies are the same to the bit"),
        (train, {"at": (-1,)}, "steps from 0 to the end of the training, got -1"),
        (train, {"at": ()}, "got none"),
        (train, {"at": (9,), "length": STEPS}, "got 9"),
        (train, {"points": 1}, "points must be at least 2"),
        (train, {"statistics": "none"}, "recompute, interpolate"),
        (train, {"masks": {"0.weight": torch.ones(2)}}, "masks: 0.weight"),
        (lambda net, run: train(net, Run(seed=run.seed)), {"at": (2,), "length": STEPS}, "took 8 steps"),
    ):
        with pytest.raises(UsageError, match=words):
            sc.instability(network, fit, accuracy, **{"points": 2, "data": data, **options})
    with pytest.raises(NonFiniteError, match="loss is nan at alpha 0"):
        sc.instability(network, train, lambda net: {"loss": float("nan")}, points=2, data=data)
