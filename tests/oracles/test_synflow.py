"""Oracles of SynFlow: scores by hand, conservation, no empty layer, one round on one layer."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

import secateur as sc
from channel_networks import Residual
from secateur.allocate import global_masks
from secateur.errors import UnsupportedModelError
from secateur.observe.flow import synaptic_flow


def layers(*weights: list[list[float]]) -> nn.Sequential:
    made = [nn.Linear(len(w[0]), len(w), bias=False) for w in weights]
    for layer, weight in zip(made, weights, strict=True):
        layer.weight = nn.Parameter(torch.tensor(weight, dtype=torch.float32))
    return nn.Sequential(*made)


def weight_flow(module: nn.Module, x: torch.Tensor):
    """masks → scores, for ``global_masks``."""
    parameters = dict(module.named_parameters())
    return lambda masks: synaptic_flow(module, (x,), {}, {n: parameters[n] * mask for n, mask in masks.items()})


def shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {n: p.shape for n, p in module.named_parameters() if p.dim() > 1}


def test_scores_by_hand():
    module = layers([[1, -2], [3, 0.5]], [[2, -1]])
    flow = synaptic_flow(module, (torch.randn(1, 2),), {})
    assert flow["0.weight"].tolist() == [[2, 4], [3, 0.5]]
    assert flow["1.weight"].tolist() == [[6, 3.5]]
    assert all(float(scores.sum()) == 9.5 for scores in flow.values())


def test_the_module_and_its_gradients_stay():
    module, x = Residual().train(), torch.randn(2, 3, 12, 12)
    before = {n: t.clone() for n, t in module.state_dict().items()}
    synaptic_flow(module, (x,), {})
    assert all(torch.equal(t, before[n]) for n, t in module.state_dict().items())
    assert module.training and all(p.grad is None for p in module.parameters())


def test_the_flow_through_every_layer_is_the_same():
    torch.manual_seed(0)
    sizes = (20, 30, 10, 5)
    module = nn.Sequential(*[nn.Linear(a, b, bias=False) for a, b in pairwise(sizes)])
    sums = [float(scores.sum()) for scores in synaptic_flow(module, (torch.randn(3, 20),), {}).values()]
    assert sums == pytest.approx([sums[0]] * 3) and sums[0] > 0


def test_one_round_on_one_layer_is_magnitude_pruning():
    torch.manual_seed(0)
    module = nn.Linear(40, 30, bias=False)
    mask = global_masks(weight_flow(module, torch.randn(1, 40)), shapes(module), 0.3)["weight"]
    least = module.weight.abs().flatten().sort(descending=True).values[359]
    assert torch.equal(mask, module.weight.abs() >= least) and int(mask.sum()) == 360


def test_rounds_never_empty_a_layer_where_magnitude_does():
    torch.manual_seed(0)
    sizes = (64, 256, 128, 128, 10)
    module = nn.Sequential(*[nn.Linear(a, b, bias=False) for a, b in pairwise(sizes)])
    magnitudes = {n: p.detach().abs() for n, p in module.named_parameters()}
    density = 0.005
    by_flow = global_masks(weight_flow(module, torch.randn(1, 64)), shapes(module), density, rounds=100)
    by_size = global_masks(lambda masks: magnitudes, shapes(module), density)
    assert min(float(mask.double().mean()) for mask in by_size.values()) < 1e-4
    assert all(mask.any() for mask in by_flow.values())
    assert sum(int(m.sum()) for m in by_flow.values()) == round(density * sum(m.numel() for m in by_flow.values()))


def test_channels_by_hand():
    """With one round, channel k has the flow in and out of it, and the one with the least leaves."""
    module = layers([[1, -2], [3, 0.5], [1, 0]], [[2, -1, 0.5], [1, 1, 1]])
    x = torch.randn(1, 2)
    options = {"rounds": 1}
    plan = sc.plan(module, example_inputs=(x,), method="synflow", sparsity=0.3, budget="channels", options=options)
    # 3 + 3.5 + 1 in, times 3 + 2 + 1.5 out, and as much again on the way out
    assert plan.scores["0"].tolist() == [18, 14, 3]
    assert plan.keep["0"].tolist() == [0, 1]


def test_later_rounds_score_what_is_left():
    """At once, the best channel of each layer stays, though one doesn't read the other; a second round sees that."""
    middle = [[0.0, 4.0, 0.1], [3.0, 0.0, 2.5]]
    module, x = layers([[1.0], [2.0], [3.0]], middle, [[1.0, 1.0]]), torch.randn(1, 1)
    kept = {}
    for rounds in (1, 2):
        options = {"rounds": rounds}
        plan = sc.plan(module, example_inputs=(x,), method="synflow", sparsity=0.6, budget="channels", options=options)
        kept[rounds] = {name: units.tolist() for name, units in plan.keep.items()}
    assert kept == {1: {"0": [1], "1": [1]}, 2: {"0": [1], "1": [0]}}


def test_a_module_of_single_precision_only_is_named():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.table = nn.Linear(3, 4), torch.ones(4, 2)

        def forward(self, x):
            return self.a(x) @ self.table

    with pytest.raises(UnsupportedModelError, match="Fixed can't be run in float64"):
        synaptic_flow(Fixed(), (torch.randn(2, 3),), {})
