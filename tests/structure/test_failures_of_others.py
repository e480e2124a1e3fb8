"""What tracing by autograd gets wrong (SPA's sheet, on DepGraph): here each one is cut, and equals what it must."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cut_networks import check, images, pruned_anatomy, randomised
from secateur.structure.groups import traced_anatomy
from secateur.structure.trace import trace

B, T, H, HD = 2, 5, 4, 3


class Literal(nn.Module):
    """Slices with bounds that stand in the code."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.left, self.right = nn.Linear(6, 12), nn.Linear(8, 5), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        return self.left(h[..., :8]) + self.right(h[..., 8:])


class Overlapping(nn.Module):
    """Two slices that share positions, and one of every second."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.left, self.right = nn.Linear(6, 12), nn.Linear(8, 5), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        return self.left(h[:, 2:10]) + self.right(h[:, 1::2])


class Grouped(nn.Module):
    """A grouped convolution and a group norm between ordinary ones, without any hint."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.grouped = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 8, 3, groups=4)
        self.b, self.norm, self.c = nn.Conv2d(8, 12, 1), nn.GroupNorm(3, 12), nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.grouped(torch.relu(self.a(x))))
        return self.c(torch.relu(self.norm(self.b(x))))


class Shuffled(nn.Module):
    """Channel shuffle as ShuffleNet writes it: view, transpose, view."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 18, 1), nn.Conv2d(18, 12, 3, groups=3), nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        batch, channels, height, width = x.shape
        x = x.view(batch, 3, channels // 3, height, width).transpose(1, 2).contiguous()
        return self.c(torch.relu(self.b(x.view(batch, channels, height, width))))


class ShuffledModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.shuffle = nn.Conv2d(3, 18, 1), nn.ChannelShuffle(3)
        self.b, self.c = nn.Conv2d(18, 12, 3, groups=3), nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(self.shuffle(torch.relu(self.a(x))))))


class PixelShuffled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 16, 3), nn.Conv2d(4, 6, 3), nn.Conv2d(24, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.b(F.pixel_shuffle(torch.relu(self.a(x)), 2)))
        return self.c(F.pixel_unshuffle(x, 2))


class Interleaved(nn.Module):
    """Grouped-query attention by ``repeat_interleave``."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(7, 2 * H * HD), nn.Linear(7, H * HD), nn.Linear(7, H * HD)
        self.o = nn.Linear(2 * H * HD, 7)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, HD)).transpose(1, 2) for f in (self.q, self.k, self.v))
        k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
        out = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        return self.o(out.transpose(1, 2).flatten(2))


class HardCoded(nn.Module):
    """Views with every size written out."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(7, 3 * H * HD), nn.Linear(H * HD, 7)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.view(B, T, H, HD).transpose(1, 2) for part in self.qkv(x).split(H * HD, dim=-1))
        out = F.scaled_dot_product_attention(q, k, v)
        return self.o(out.transpose(1, 2).reshape(B, T, H * HD))


class Detached(nn.Module):
    """A branch that autograd doesn't see."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        return self.b(h) + self.c(h.detach())


class Raw(nn.Module):
    """Parameters that belong to no layer, on either side of a product."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.zeros(6, 8)), nn.Parameter(torch.zeros(5, 8))
        self.third, self.shift = nn.Parameter(torch.zeros(3, 5)), nn.Parameter(torch.zeros(1, 8))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(x @ self.first + self.shift)
        return (self.third @ (self.second @ h.T)).T


class Twice(nn.Module):
    """A module that is applied twice joins what it reads with what it makes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.shared, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.shared(torch.relu(self.shared(self.a(x))))))


class ChannelsLast(nn.Module):
    """Flattened with the channels innermost."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 6, 3), nn.Linear(6 * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.conv(x)).permute(0, 2, 3, 1).flatten(1))


class Selected(nn.Module):
    """Positions looked up by a constant: some twice, some never."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(7, 3)
        self.register_buffer("order", torch.tensor([7, 0, 3, 3, 5, 1, 0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)).index_select(1, self.order))


@dataclass(frozen=True)
class Case:
    """A network, the units of its groups by name, and some sizes when unit 0 of every group has left."""

    network: Callable[[], nn.Module]
    shape: tuple[int, ...]
    groups: dict[str, int]
    sizes: dict[str, tuple[int, ...]]


SHUFFLED = {"a": 3, "a#2": 3, "b": 4}
SHUFFLED_SIZES = {"a.weight": (8, 3, 1, 1), "b.weight": (6, 4, 3, 3), "c.weight": (2, 6, 1, 1)}
CASES = [
    Case(Literal, (B, 6), {"a": 8, "a#2": 4}, {"a.weight": (10, 6), "left.weight": (5, 7), "right.weight": (5, 3)}),
    Case(
        # in neither slice, in the second only, in the first only, in both
        Overlapping,
        (B, 6),
        {"a": 2, "a#2": 2, "a#3": 4, "a#4": 4},
        {"a.weight": (8, 6), "left.weight": (5, 6), "right.weight": (5, 4)},
    ),
    Case(
        # channels of a group, and whole groups, of the convolution; whole groups, and channels of a group, of the norm
        Grouped,
        (B, 3, 8, 8),
        {"a": 3, "a#2": 4, "grouped": 2, "b": 3, "b#2": 4},
        {"a.weight": (6, 3, 3, 3), "grouped.weight": (3, 2, 3, 3), "b.weight": (6, 3, 1, 1), "norm.weight": (6,)},
    ),
    Case(Shuffled, (B, 3, 6, 6), SHUFFLED, SHUFFLED_SIZES),
    Case(ShuffledModule, (B, 3, 6, 6), SHUFFLED, SHUFFLED_SIZES),
    Case(
        PixelShuffled,
        (B, 3, 8, 8),
        {"a": 4, "b": 6},
        {"a.weight": (12, 3, 3, 3), "b.weight": (5, 3, 3, 3), "c.weight": (2, 20, 1, 1)},
    ),
    Case(
        # heads, lanes of queries and keys, lanes of values
        Interleaved,
        (B, T, 7),
        {"q": 4, "q#2": 3, "v": 3},
        {"q.weight": (12, 7), "k.weight": (6, 7), "v.weight": (6, 7), "o.weight": (7, 12)},
    ),
    Case(HardCoded, (B, T, 7), {"qkv": 4, "qkv#2": 3, "qkv#3": 3}, {"qkv.weight": (18, 7), "o.weight": (7, 6)}),
    Case(Detached, (B, 6), {"a": 8}, {"a.weight": (7, 6), "b.weight": (5, 7), "c.weight": (5, 7)}),
    Case(Raw, (B, 6), {"first": 8, "second": 5}, {"first": (6, 7), "second": (4, 7), "third": (3, 4), "shift": (1, 7)}),
    Case(Twice, (B, 6), {"a": 8}, {"a.weight": (7, 6), "shared.weight": (7, 7), "c.weight": (3, 7)}),
    Case(ChannelsLast, (B, 3, 6, 6), {"conv": 6}, {"conv.weight": (5, 3, 3, 3), "fc.weight": (4, 80)}),
    # taken twice, taken once, never taken
    Case(Selected, (B, 6), {"a": 2, "a#2": 3, "a#3": 3}, {"a.weight": (5, 6), "b.weight": (3, 4)}),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.network.__name__)
def test_what_autograd_misses_is_cut_exactly(case):
    module, inputs = randomised(case.network()), images(*case.shape)
    traced = trace(module, inputs)
    assert traced.unknown == {}
    both = traced_anatomy(traced, heads="both")
    assert {g.name: g.units for g in both.groups} == case.groups
    first = pruned_anatomy(module, inputs, both, {name: [0] for name in case.groups})
    assert {name: first.sizes[name] for name in case.sizes} == case.sizes
    check(first)
    for seed, (heads, fraction) in enumerate([("outer", 0.2), ("outer", 0.7), ("inner", 0.4), ("both", 0.5)]):
        check(pruned_anatomy(module, inputs, traced_anatomy(traced, heads=heads), None, fraction, seed))
