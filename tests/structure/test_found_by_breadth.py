"""Operators and strides on which ``benchmarks/breadth.py`` found the tracer too careful, or stuck."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import secateur as sc
from channel_networks import Attention
from cut_networks import check, images, pruned, randomised, tokens
from secateur.structure.modulecut import cut_module


class Differences(nn.Module):
    """Channels go through a difference along the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).diff(dim=1))


class Numbered(nn.Module):
    """Token ids as one-hot rows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 10), nn.Linear(10, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.second(self.first(functional.one_hot(ids, 6).double()))


class Tiled(nn.Module):
    """A tile that names the last dimensions only."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 10, 1), nn.Conv2d(10, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tile((2, 2)))


class ChannelsLast(nn.Module):
    """The group norm keeps strides that make the last reshape a view; the reference has other strides."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(4, 10), nn.GroupNorm(1, 10), nn.Linear(90, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x).permute(0, 3, 1, 2))
        return self.second(x.permute(0, 2, 3, 1).reshape(len(x), -1))


class Masked(nn.Module):
    """Two masks are combined before they are used."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(x.masked_fill((x > 0.5) & (x < 1.5), 0.0))


class FromTheEnd(nn.Module):
    """Heads are taken by a list of numbers that count from the end, as Falcon takes its only key-value head."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.first, self.second = 5, nn.Linear(4, 15), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.first(x).reshape(len(x), self.num_heads, -1)
        return self.second(heads[:, [-3, -1]].flatten(1))


NETWORKS = {
    Differences: images(2, 5, 4),
    Numbered: tokens(2, 5, below=6),
    Tiled: images(2, 3, 4, 4),
    FromTheEnd: images(2, 4),
    ChannelsLast: images(2, 3, 3, 4),
    Masked: images(2, 5, 4),
}


@pytest.mark.parametrize("kind", NETWORKS, ids=lambda kind: kind.__name__)
def test_they_are_cut(kind):
    found = pruned(randomised(kind()), NETWORKS[kind])
    assert "first" in found.removed and not found.trace.unknown
    check(found)


@pytest.mark.parametrize(("kind", "units"), {Tiled: [1, 4], FromTheEnd: [0]}.items(), ids=["Tiled", "FromTheEnd"])
def test_the_own_module_is_cut(kind, units):
    found = pruned(randomised(kind()), NETWORKS[kind], {"first": units})
    module = cut_module(found.cut, found.graph, found.inputs, {})
    with torch.no_grad():
        assert torch.equal(module(*found.inputs), found.graph(*found.inputs))


def test_as_many_heads_as_lanes():
    """Heads and lanes visit the same places, and were one group that nothing could leave."""
    module, x = Attention(dim=16, heads=4).eval(), torch.randn(2, 7, 6)
    for heads, free, stays in (("outer", "qkv", "qkv#2"), ("inner", "qkv#2", "qkv")):
        anatomy = sc.anatomy(module, example_inputs=(x,), heads=heads)
        assert anatomy[free].frozen is None and "attention stay" in str(anatomy[stays].frozen)
        assert {p.tensor for p in anatomy[free].slices} == {"qkv.weight", "qkv.bias", "proj.weight"}
    plan = sc.plan(module, example_inputs=(x,), method="spa_l1", sparsity=0.0, ratios={"qkv": 0.5})
    cut, masked = sc.apply(plan, module), sc.apply(plan, module, mask=True)
    assert cut.get_parameter("proj.weight").shape == (16, 8)
    assert torch.allclose(cut(x), masked(x), atol=1e-5)
