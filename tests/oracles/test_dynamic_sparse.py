"""Oracles of SET, RigL and SNFS: what leaves and grows by hand, constant numbers, steps that aren't taken."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.methods import Trained, make_method
from secateur.train.updating import exchanged, shared_out
from sparse_training import network, sgd, sparsifier, train

ALIKE = {"distribution": "uniform"}


def test_the_cosine_of_rigl():
    method = make_method("rigl", {"steps": 400})
    assert method.last == 300 and method.rate(0) == 0.3 and method.rate(300) == 0
    assert method.rate(100) == pytest.approx(0.15 * (1 + math.cos(math.pi / 3)))
    # int(live * f), as the official code
    assert method.exchanged(9, 0.3) == 2


def test_rigl_by_hand():
    """The smallest live weight leaves, the largest gradient among the others grows, and no step is taken."""
    module = nn.Linear(5, 1, bias=False)
    module.weight.data.copy_(torch.tensor([[3, -1, 0.5, 0, 0]]))
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    masks = {"weight": torch.tensor([[True, True, True, False, False]])}
    options = {"sparsity": 0.4, "fraction": 0.5, "end": 4, "every": 2, "begin": 2}
    pruned = sc.Sparsifier(module, optimizer, method="rigl", masks=masks, **options)
    for step in (1, 2, 3):
        before = module.weight.detach().clone()
        state = {k: v.clone() for k, v in optimizer.state[module.weight].items()}
        module.weight.grad = torch.tensor([[0.3, 0.2, 0.1, -0.9, 0.4]])
        optimizer.step()
        pruned.step()
        after = module.weight.detach()
        if step == 2:
            # 0.5 * (1 + cos(pi / 2)) / 2 of three is none; nothing has left, and yet the step wasn't taken
            assert torch.equal(after, before)
            assert all(torch.equal(v, state[k]) for k, v in optimizer.state[module.weight].items())
        else:
            assert bool((after != before)[:, :3].all()) and not after[0, 3:].any()
    more = sc.Sparsifier(module, optimizer, method="rigl", masks=masks, **options, decay="constant", seed=1)
    pruned.finish()
    before = module.weight.detach().clone()
    for _ in range(2):
        kept = module.weight.detach().clone()
        module.weight.grad = torch.tensor([[0.3, 0.2, 0.1, -0.9, 0.4]])
        optimizer.step()
        more.step()
    assert more.masks["weight"].tolist() == [[True, True, False, True, False]]
    # those that stay are what they were before the step, and what has grown begins at zero
    assert torch.equal(module.weight[0, :2], kept[0, :2]) and not module.weight[0, 2:].any()
    assert not optimizer.state[module.weight]["exp_avg"][0, 2:].any()


def test_noise_decides_ties_the_same_way_every_time():
    part = Trained("w", torch.ones(4, 4), torch.ones(4, 4, dtype=torch.bool), step=3)
    method = make_method("rigl")
    first, again = method.score(part), method.score(part)
    other = method.score(Trained("w", torch.ones(4, 4), part.mask, step=4))
    assert torch.equal(first, again) and not torch.equal(first, other) and len(first.unique()) > 8
    assert float((first - 1).abs().max()) < 1e-4


def test_set_grows_at_random_and_drops_the_smallest():
    module = nn.Linear(40, 25, bias=False)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    pruned = sc.Sparsifier(
        module, optimizer, method="set", sparsity=0.8, begin=1, every=1, end=2, distribution="uniform"
    )
    before = pruned.masks["weight"]
    staying = module.weight.detach().abs() > module.weight.detach().abs()[before].sort().values[59]
    optimizer.step()
    pruned.step()
    after = pruned.masks["weight"]
    gone = before & ~after
    # 0.3 of 200 leave; of those some may have been drawn again
    assert int(after.sum()) == 200 and 40 < int(gone.sum()) <= 60 and pruned.log[0].exchanged == int(gone.sum())
    assert not module.weight[after & ~before].any()
    assert bool(after[staying & before].all())


def test_set_can_treat_signs_alike():
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0, -10.0, -20.0, -30.0, -40.0]])
    part = Trained("w", weight, torch.ones_like(weight, dtype=torch.bool))
    lowest = make_method("set", {"split_signs": True}).score(part)[0].argsort()[:4]
    assert sorted(lowest.tolist()) == [0, 1, 4, 5]


def test_sparse_momentum_moves_weights_where_gradients_are_large():
    module = network()
    optimizer = sgd(module)
    pruned = sparsifier(module, optimizer, "snfs", sparsity=0.8, beta=0.5)
    naive = {name: torch.zeros_like(mask, dtype=torch.float32) for name, mask in pruned.masks.items()}

    def follow(step):
        for name, mean in naive.items():
            mean.mul_(0.5).add_(0.5 * module.get_parameter(name).grad)

    train(module, optimizer, pruned, last=3, seen=follow)
    kept = pruned.state_dict()["momentum"]
    assert all(torch.allclose(kept[name], mean) for name, mean in naive.items())
    before = {name: int(mask.sum()) for name, mask in pruned.masks.items()}
    train(module, optimizer, pruned, first=4)
    after = {name: int(mask.sum()) for name, mask in pruned.masks.items()}
    assert sum(before.values()) == sum(after.values()) and before != after
    fixed = sparsifier(other := network(), sgd(other), "snfs", sparsity=0.8, redistribute=False)
    assert fixed.method.shares({}) is None


def test_the_rates_of_sparse_momentum():
    method = make_method("snfs", {"steps": 400})
    # the cosine of the official code ends at 0.005, with the training, and numbers are rounded up
    assert method.rate(0) == 0.5 and method.rate(200) == pytest.approx(0.2525) and method.rate(400) == 0.005
    assert (
        method.exchanged(9, 0.3) == 3
        and make_method("snfs", {"steps": 9, "every": 1, "decay": "constant"}).rate(9) == 0.5
    )

    def part(name: str, live: int, momentum: float) -> Trained:
        mask = torch.arange(100) < live
        # dead weights have a larger one, which is no part of the mean
        return Trained(name, torch.ones(100), mask, momentum=torch.where(mask, momentum, 9.0))

    parts = {p.name: p for p in (part("a", 90, 3.0), part("b", 90, 1.0), part("c", 50, 3.0), part("d", 100, 3.0))}
    assert method.shares(parts) == {"a": 3.0, "b": 1.0, "c": 3.0, "d": 3.0}
    # nearly dense ones that are to grow lose no more than they have free
    assert method.exchanged_counts(parts, 0.5) == {"a": 9, "b": 45, "c": 25, "d": 0}
    even = make_method("snfs", {"steps": 400, "redistribute": False, "growth": "gradient"})
    assert even.exchanged_counts(parts, 0.5) == {"a": 45, "b": 45, "c": 25, "d": 50}


def test_layers_are_shared_out_to_by_the_momentum_before_anything_leaves():
    """The live weights of b have a mean of 4 before, and of 8 once the small one has gone: then b would get both."""
    weight = {"a": torch.tensor([[4.0, 3.0, 0.0, 0.0, 0.0]]), "b": torch.tensor([[4.0, 1.0, 0.0, 0.0, 0.0]])}
    momentum = {"a": torch.tensor([[2.0, 2.0, 9.0, 8.0, 7.0]]), "b": torch.tensor([[8.0, 0.0, 7.0, 5.0, 4.0]])}
    parts = {n: Trained(n, w, w != 0, step=1, momentum=momentum[n]) for n, w in weight.items()}
    masks, moved = exchanged(
        make_method("snfs", {"steps": 2, "every": 1, "decay": "constant"}),
        parts, {n: p.mask for n, p in parts.items()}, {n: w.abs() for n, w in weight.items()}, 1, lambda t: t,
    )  # fmt: skip
    assert moved == 2 and masks["a"].tolist() == [[True, False, True, False, False]]
    assert masks["b"].tolist() == [[True, False, True, False, False]]


def test_what_is_shared_out_fits():
    assert shared_out(10, {"a": 3.0, "b": 1.0, "c": 1.0}, {"a": 50, "b": 50, "c": 50}) == {"a": 6, "b": 2, "c": 2}
    # what a full layer can't take goes to the others
    assert shared_out(10, {"a": 3.0, "b": 1.0, "c": 1.0}, {"a": 2, "b": 50, "c": 50}) == {"a": 2, "b": 4, "c": 4}
    assert shared_out(5, {"a": 0.0, "b": 0.0}, {"a": 1, "b": 9}) == {"a": 1, "b": 4}


def test_momentum_and_random_growth_are_options_of_all():
    for growth, needs in (("momentum", ("momentum",)), ("random", ()), ("gradient", ("gradient",))):
        for method in ("rigl", "set", "granet"):
            assert make_method(method, {"growth": growth}).needed() == needs
    module = network()
    optimizer = sgd(module)
    train(module, optimizer, pruned := sparsifier(module, optimizer, "rigl", sparsity=0.8, growth="momentum"))
    assert sum(update.exchanged for update in pruned.log) > 0
