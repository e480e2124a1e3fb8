"""Coupled channels as units of a Sparsifier: they leave everywhere at once, stay dead, and the plan cuts them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import secateur as sc
from secateur.errors import UsageError
from sparse_training import batch, same, train


class Net(nn.Module):
    """Two convolutions around a residual connection, with norms, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.inner, self.inner_norm = nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.outer, self.head = nn.Conv2d(12, 8, 3, padding=1), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.outer(F.relu(self.inner_norm(self.inner(x))))
        return self.head(x.mean((2, 3)))


def network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net()


def made(module, **options):
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    options = {"method": "gmp", "sparsity": 0.5, "begin": 2, "every": 2, "end": 8, **options}
    return optimizer, sc.Sparsifier(module, optimizer, units="channels", example_inputs=(batch(0)[0],), **options)


def test_channels_leave_everywhere_stay_dead_and_are_cut():
    module = network()
    optimizer, pruned = made(module)
    assert {name: len(mask) for name, mask in pruned.masks.items()} == {"stem": 8, "inner": 12}

    def check(step):
        assert pruned.sparsity <= pruned.target + 1e-6
        dead, gone = ~pruned.masks["inner"], ~pruned.masks["stem"]
        for weight in (module.inner.weight[dead], module.inner.bias[dead], module.inner_norm.weight[dead],
                       module.inner_norm.bias[dead], module.outer.weight[:, dead], module.stem.weight[gone],
                       module.norm.bias[gone], module.outer.weight[gone], module.outer.bias[gone],
                       module.inner.weight[:, gone], module.head.weight[:, gone]):  # fmt: skip
            assert not weight.any()
        assert not optimizer.state[module.outer.weight]["momentum_buffer"][:, dead].any()

    train(module, optimizer, pruned, seen=check)
    assert pruned.sparsity == 0.5 and pruned.sparsities == {"stem": 0.5, "inner": 0.5}
    cut = sc.apply(pruned.finish(), module.eval())
    assert (cut.inner.in_channels, cut.inner.out_channels, cut.head.in_features) == (4, 6, 4)
    x = batch(3)[0]
    assert torch.allclose(cut(x), module(x), atol=1e-5)


class Constant(nn.Module):
    """A dead channel behind this norm is no zero by its parameters, and what reads it has no weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8, affine=False, momentum=None)
        self.head = nn.Conv2d(8, 5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(x))
        return self.head(x + x.sum(1, keepdim=True)).mean((2, 3))


@pytest.mark.parametrize("kind", ["statistics", "frozen"])
def test_what_is_not_trained_is_dead_as_well(kind):
    module = Constant() if kind == "statistics" else network()
    if kind == "frozen":
        module.inner_norm.bias.data.fill_(1.0)
        module.outer.weight.requires_grad_(False), module.inner_norm.requires_grad_(False)
    optimizer, pruned = made(module)
    # as moving to another device does, it leaves parameters in place and replaces buffers
    module._apply(torch.clone)
    train(module, optimizer, pruned)
    x, module = batch(1)[0], module.eval()
    assert torch.allclose(module(x), sc.apply(pruned.finish(), module)(x), atol=1e-5)


def test_the_smallest_units_leave_first():
    module = network()
    with torch.no_grad():
        for layer in (module.inner, module.stem, module.outer):
            layer.weight.fill_(1.0)
        # all that leaves with a unit counts: the ninth is small where it is read
        module.inner.weight[3] = 0.1
        module.outer.weight[:, 9] = 0.01
        module.outer.weight[:, 3] = 0.5
    pruned = made(module, sparsity=2 / 12, ramp="constant", begin=0, end=1, every=1)[1]
    pruned_units = (~pruned.masks["inner"]).nonzero()[:, 0].tolist()
    assert pruned_units == [3, 9]


def test_all_groups_compete_and_each_keeps_one():
    module = network()
    with torch.no_grad():
        module.inner.weight.mul_(torch.arange(1, 13.0)[:, None, None, None] ** 4)
    optimizer, pruned = made(module, scope="global", sparsity=0.9)
    train(module, optimizer, pruned)
    live = {name: int(mask.sum()) for name, mask in pruned.masks.items()}
    assert sum(live.values()) == 2 and min(live.values()) == 1
    x = batch(3)[0]
    assert torch.allclose(sc.apply(pruned.plan(), module.eval())(x), module(x), atol=1e-5)


def test_a_resumed_training_is_the_uninterrupted_one(tmp_path):
    whole, parts = network(), network()
    optimizer, pruned = made(whole)
    train(whole, optimizer, pruned)
    again, first = made(parts)
    train(parts, again, first, last=5)
    first.save(tmp_path / "masks.safetensors")
    kept = {"model": parts.state_dict(), "optimizer": again.state_dict()}
    other = network(seed=1)
    other.load_state_dict(kept["model"])
    fresh, second = made(other, resume=tmp_path / "masks.safetensors")
    fresh.load_state_dict(kept["optimizer"])
    train(other, fresh, second, first=6)
    assert same(whole, other) and second.log == pruned.log


def test_averages_are_masked_and_names_are_left_out():
    module = network()
    optimizer, pruned = made(module, exclude=["stem"])
    assert list(pruned.masks) == ["inner"]
    train(module, optimizer, pruned)
    average = network(seed=2)
    pruned.apply(average)
    assert not average.outer.weight[:, ~pruned.masks["inner"]].any() and average.stem.weight.all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "rigl"}, "rigl with these options prunes single weights"),
        ({"method": "granet", "steps": 12}, "granet with these options"),
        ({"criterion": "saliency"}, "needs no gradient"),
        ({"pattern": "2:4"}, "single weights"),
        ({"include": ["norm.weight"]}, "leave out include"),
        ({"keep_first": True}, "leave out include, keep_first"),
        ({"exclude": ["stem", "inner"]}, "no channels that can leave"),
    ],
)
def test_what_goes_with_single_weights_alone_is_refused(options, words):
    with pytest.raises(UsageError, match=words):
        made(network(), **options)


def test_what_is_asked_wrongly_is_refused():
    with pytest.raises(UsageError, match="units must be weights or channels"):
        sc.Sparsifier(network(), units="filters", end=4, every=1)
    with pytest.raises(UsageError, match="give example_inputs"):
        sc.Sparsifier(network(), units="channels", end=4, every=1)
    with pytest.raises(UsageError, match="count the cut network's"):
        made(network())[1].flops(batch(0)[0])
