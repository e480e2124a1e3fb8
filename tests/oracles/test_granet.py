"""Oracles of GraNet: regrowth by hand, counts, and what it becomes at the ends of its options."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.allocate import kept_counts
from secateur.methods import Trained, make_method
from secateur.train.updating import exchanged
from sparse_training import RAMP, network, same, sgd, sparsifier, train


def one_update(gradient: list[float]) -> tuple[list[int], list[float]]:
    """w = [3, -1, .5, 0, 0], of which the first three live; a third is exchanged."""
    module = nn.Linear(5, 1, bias=False)
    module.weight.data.copy_(torch.tensor([[3, -1, 0.5, 0, 0]]))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0, momentum=0.9)
    masks = {"weight": torch.tensor([[True, True, True, False, False]])}
    options = {"sparsity": 0.4, "fraction": 1 / 3, "decay": "constant", "end": 1, "every": 1, "steps": 1}
    pruned = sc.Sparsifier(module, optimizer, method="granet", masks=masks, **options)
    module.weight.grad = torch.tensor([gradient])
    optimizer.step()
    pruned.step()
    # the momentum of what has grown begins at zero
    assert not optimizer.state[module.weight]["momentum_buffer"][0, 3:].any()
    return pruned.masks["weight"][0].int().tolist(), module.weight[0].tolist()


def test_by_hand():
    # what left has the largest gradient of those that aren't live, and keeps its value
    assert one_update([9, 9, 0.9, 0.2, 0.7]) == ([1, 1, 1, 0, 0], [3, -1, 0.5, 0, 0])
    assert one_update([9, 9, 0.1, 0.2, 0.7]) == ([1, 1, 0, 0, 1], [3, -1, 0, 0, 0])


def test_what_the_ramp_took_grows_at_zero_and_what_the_exchange_took_keeps_its_value():
    module = nn.Linear(6, 1, bias=False)
    module.weight.data.copy_(torch.tensor([[6.0, 5.0, 4.0, 3.0, 2.0, 1.0]]))
    options = {"sparsity": 0.5, "fraction": 0.3, "decay": "constant", "begin": 0, "end": 1, "every": 1, "steps": 1}
    pruned = sc.Sparsifier(module, method="granet", **options)
    # 1, 2 and 3 leave by the ramp, then 4 in the exchange, and what has left last has no gradient
    module.weight.grad = torch.tensor([[0.0, 0.0, 0.0, 0.0, 9.0, 0.0]])
    pruned.step()
    assert module.weight[0].tolist() == [6, 5, 0, 0, 0, 0] and pruned.masks["weight"][0].tolist()[4]
    again = nn.Linear(6, 1, bias=False)
    again.weight.data.copy_(torch.tensor([[6.0, 5.0, 4.0, 3.0, 2.0, 1.0]]))
    other = sc.Sparsifier(again, method="granet", **options)
    again.weight.grad = torch.tensor([[0.0, 0.0, 9.0, 0.0, 0.0, 0.0]])
    other.step()
    assert again.weight[0].tolist() == [6, 5, 4, 0, 0, 0]


def test_the_ramp_and_the_decay():
    method = make_method("granet", {"end": 80, "every": 8, "steps": 160})
    assert [round(method.schedule()(8 * k), 4) for k in range(11)] == RAMP
    assert method.rate(0) == 0.5 and method.rate(160) == 0.005
    assert method.rate(80) == pytest.approx((0.5 + 0.005) / 2)
    # the exchange goes on when the ramp is over
    assert [t for t in range(170) if method.updates().due(t)][-1] == 160
    assert method.exchanged(7, 0.3) == 3


def test_layers_keep_their_numbers_in_an_exchange():
    generator = torch.Generator().manual_seed(0)
    method = make_method("granet", {"end": 80, "every": 8, "steps": 160})
    parts = {}
    for name, shape in {"a": (9, 7), "b": (30, 2), "c": (4, 4)}.items():
        mask = torch.rand(shape, generator=generator) < 0.4
        weight = torch.randn(shape, generator=generator) * mask
        parts[name] = Trained(name, weight, mask, step=8, gradient=torch.randn(shape, generator=generator))
    masks = {name: part.mask for name, part in parts.items()}
    found, moved = exchanged(method, parts, masks, {n: method.score(p) for n, p in parts.items()}, 8, lambda t: t)
    assert moved > 0 and all(int(found[n].sum()) == int(masks[n].sum()) for n in masks)


def test_without_regrowth_it_is_gmp_of_all_layers_together():
    first, second = network(), network()
    optimizer, other = sgd(first), sgd(second)
    train(first, optimizer, sparsifier(first, optimizer, "granet", sparsity=0.8, fraction=0.0))
    train(second, other, sparsifier(second, other, "gmp", sparsity=0.8, scope="global"))
    assert same(first, second)


def test_at_equal_sparsities_only_connections_move():
    module = network()
    optimizer = sgd(module)
    pruned = sparsifier(module, optimizer, "granet", initial=0.8, sparsity=0.8)
    before = {name: int(mask.sum()) for name, mask in pruned.masks.items()}
    first = pruned.masks
    train(module, optimizer, pruned)
    assert {name: int(mask.sum()) for name, mask in pruned.masks.items()} == before
    assert any(not torch.equal(first[name], mask) for name, mask in pruned.masks.items())


def test_it_begins_at_erk():
    pruned = sparsifier(module := network(), sgd(module), "granet", initial=0.5)
    shapes = {name: tuple(mask.shape) for name, mask in pruned.masks.items()}
    counts = {name: int(mask.sum()) for name, mask in pruned.masks.items()}
    assert (
        counts == kept_counts(shapes, 0.5, "erk")
        and sum(counts.values()) == sum(mask.numel() for mask in pruned.masks.values()) // 2
    )


def test_sparse_to_sparse_never_has_more_than_scheduled():
    module = network()
    optimizer = sgd(module)
    pruned = sparsifier(module, optimizer, "granet", initial=0.5, sparsity=0.9)
    total = sum(mask.numel() for mask in pruned.masks.values())
    seen = []
    train(module, optimizer, pruned, seen=lambda step: seen.append((step, pruned.sparsity)))
    for step, sparsity in seen:
        reached = pruned.method.schedule()(step - step % 2 if step >= 2 else 0)
        assert sparsity == pytest.approx(reached, abs=1 / total), step
