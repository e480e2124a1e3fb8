"""Oracles of masks before training: SNIP, GraSP, SynFlow on weights, and random masks by ERK."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import secateur as sc
from secateur.allocate import erk
from secateur.errors import DataError, NonFiniteError
from secateur.methods import Trained, make_method
from sparse_training import batch, network

DATA = [batch(0), batch(1)]


def masks(method: str, module: nn.Module, **options) -> dict[str, torch.Tensor]:
    return sc.Sparsifier(module, method=method, **{"data": DATA, "example_inputs": (batch(0)[0],), **options}).masks


def perceptron(*sizes: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    parts: list[nn.Module] = []
    for a, b in pairwise(sizes):
        parts += [nn.Linear(a, b, bias=False), nn.ReLU()]
    return nn.Sequential(*parts[:-1])


@pytest.mark.parametrize(
    ("sparsity", "densities"),
    [
        (0.9, (0.079568, 0.230189, 1.0)),
        (0.95, (0.038484, 0.111334, 0.918507)),
        (0.98, (0.015394, 0.044534, 0.367403)),
        (0.5, (0.434099, 1.0, 1.0)),
    ],
)
def test_densities_of_erk(sparsity, densities):
    shapes = [(300, 784), (100, 300), (10, 100)]
    assert erk(shapes, 1 - sparsity).tolist() == pytest.approx(list(densities), abs=1e-6)
    module = nn.Sequential(*[nn.Linear(i, o) for o, i in shapes])
    pruned = sc.Sparsifier(module, method="erk_random", sparsity=sparsity)
    found = [1 - one for one in pruned.sparsities.values()]
    assert found == pytest.approx(list(densities), abs=1e-3)
    assert pruned.sparsity == pytest.approx(sparsity, abs=1e-5)
    alike = sc.Sparsifier(module, method="erk_random", sparsity=sparsity, distribution="uniform", seed=1)
    assert list(alike.sparsities.values()) == pytest.approx([sparsity] * 3, abs=1e-3)


def test_densities_of_erk_count_kernels():
    found = erk([(16, 3, 3, 3), (32, 16, 3, 3), (64, 32, 3, 3), (10, 64)], 0.1)
    assert found.tolist() == pytest.approx([0.566298, 0.114675, 0.054152, 1.0], abs=1e-6)


def test_random_masks_differ_by_seed_alone():
    first, again, other = (masks("erk_random", network(), seed=seed)["4.weight"] for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_snip_keeps_the_highest_products_of_all_layers():
    module = network().eval()
    x, y = (torch.cat(parts) for parts in zip(*DATA, strict=True))
    F.cross_entropy(module(x), y).backward()
    names = ("0.weight", "4.weight", "6.weight")
    scores = {n: (module.get_parameter(n) * module.get_parameter(n).grad).abs().detach() for n in names}
    module.zero_grad()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    found = masks("snip", module, sparsity=0.8)
    together = torch.cat([scores[n].flatten() for n in names])
    kept = torch.cat([found[n].flatten() for n in names])
    assert int(kept.sum()) == -int(-len(together) * 0.2 // 1)
    assert float(together[kept].min()) >= float(together[~kept].max()) - 1e-9
    # weights that stay are those that were there
    assert all(torch.equal(module.get_parameter(n)[found[n]], before[n][found[n]]) for n in names)
    assert all(torch.equal(module.state_dict()[n], t) for n, t in before.items() if n not in names)
    assert all(parameter.grad is None for parameter in module.parameters())


def test_the_scale_of_the_loss_changes_no_mask_of_snip():
    def loss(module, batch):
        return 7 * F.cross_entropy(module(batch[0]), batch[1])

    first, second = masks("snip", network()), masks("snip", network(), loss=loss)
    assert all(torch.equal(mask, second[name]) for name, mask in first.items())


def test_rounds_score_what_is_left():
    once, rounds = masks("snip", network()), masks("snip_iterative", network(), rounds=5)
    alone = masks("snip_iterative", network(), rounds=1)
    assert all(torch.equal(mask, alone[name]) for name, mask in once.items())
    assert sum(int(m.sum()) for m in rounds.values()) == sum(int(m.sum()) for m in once.values())
    assert any(not torch.equal(mask, rounds[name]) for name, mask in once.items())


def test_grasp_by_hand():
    """L = theta' A theta / 2 with A = diag(1, 2): H g = A^2 theta, and theta * H g is (1, 4): the first one leaves."""

    class Quadratic(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 1, bias=False)
            nn.init.ones_(self.layer.weight)

        def forward(self, x):
            return (self.layer.weight.square() * torch.tensor([1.0, 2.0])).sum() / 2 + 0 * x.sum()

    part = Trained("w", torch.ones(2), torch.ones(2, dtype=torch.bool), curvature=torch.tensor([1.0, 4.0]))
    assert make_method("grasp").score(part).tolist() == [1.0, 4.0]
    pruned = sc.Sparsifier(
        Quadratic(), method="grasp", sparsity=0.5, data=[torch.zeros(1, 2)], loss=lambda module, x: module(x)
    )
    assert pruned.masks["layer.weight"].tolist() == [[False, True]]


def test_the_temperature_of_grasp_divides_logits():
    module = network().eval()
    loss = make_method("grasp", {"temperature": 3.0}).loss()
    expected = F.cross_entropy(module(DATA[0][0]) / 3.0, DATA[0][1])
    assert loss(module, DATA[0]).item() == pytest.approx(expected.item())


def test_synflow_by_hand():
    module = perceptron(2, 2, 1)
    module[0].weight.data.copy_(torch.tensor([[1.0, -2.0], [3.0, 0.5]]))
    module[2].weight.data.copy_(torch.tensor([[2.0, -1.0]]))
    # scores [[2, 4], [3, .5]] and [6, 3.5]: the three highest stay
    found = masks("synflow_weights", module, sparsity=0.5, rounds=1, example_inputs=(torch.zeros(1, 2),))
    assert found["0.weight"].tolist() == [[False, True], [False, False]]
    assert found["2.weight"].tolist() == [[True, True]]


def test_synflow_never_empties_a_layer_and_one_layer_is_magnitude():
    inputs = (torch.zeros(1, 64),)
    found = masks("synflow_weights", perceptron(64, 128, 64, 64, 10), sparsity=0.99, rounds=20, example_inputs=inputs)
    assert all(mask.any() for mask in found.values())
    layer = perceptron(64, 30)
    alone = masks("synflow_weights", layer, sparsity=0.7, rounds=1, example_inputs=inputs)["0.weight"]
    flat = perceptron(64, 30)[0].weight.abs()
    assert torch.equal(alone, flat >= flat.flatten().sort().values[int(0.7 * flat.numel())])


def test_synflow_ranks_flows_that_are_beyond_float32():
    module = perceptron(*[6] * 61)
    for layer in module[::2]:
        layer.weight.data.mul_(0.1)
    found = masks("synflow_weights", module, sparsity=0.5, rounds=20, example_inputs=(torch.zeros(1, 6),))
    live = [int(mask.sum()) for mask in found.values()]
    # the flow through every layer is the same, so that none loses much more than another
    assert min(live) > 36 / 4


def test_one_layer_may_be_left_without_weights_and_a_floor_prevents_it():
    """Magnitude at once empties the layer with the largest fan-in; a floor keeps it alive."""
    module = perceptron(64, 256, 128, 10)
    module[0].weight.data.mul_(10)
    options = {"sparsity": 0.95, "scope": "global", "ramp": "constant", "end": 1, "every": 1}
    with pytest.warns(UserWarning, match=r"nothing is left of 2\.weight, 4\.weight after step 0.*floor=0\.01 keeps"):
        pruned = sc.Sparsifier(copy.deepcopy(module), method="gmp", **options)
    assert pruned.sparsities["2.weight"] == 1.0
    floored = sc.Sparsifier(module, method="gmp", **options, floor=0.01)
    assert floored.sparsities["2.weight"] == pytest.approx(0.99, abs=1e-4) and floored.sparsity <= 0.95


def test_what_a_method_must_look_at_is_asked_for():
    for method in ("snip", "snip_iterative", "grasp"):
        with pytest.raises(DataError, match=f"{method} scores weights by a loss on labelled data: give data="):
            masks(method, network(), data=None)
        with pytest.raises(DataError, match="batches must be pairs"):
            masks(method, network(), data=[batch(0)[0]])
        with pytest.raises(DataError, match="is empty"):
            masks(method, network(), data=[])
    with pytest.raises(DataError, match=r"synflow_weights runs the network on ones: give example_inputs=\(x,\)"):
        masks("synflow_weights", network(), example_inputs=None)
    broken = network()
    broken[4].weight.data[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="NaN or inf"):
        masks("snip", broken)
