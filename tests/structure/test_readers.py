"""Weights that read channels compute as matrices what the call computes; a walk gives what a cut network gives."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cut_networks import choose, difference, images, randomised
from random_networks import RandomNetwork
from secateur.errors import SecateurError
from secateur.structure.graphcut import cut_graph
from secateur.structure.groups import HEADS, traced_anatomy
from secateur.structure.readers import Readers, find_readers
from secateur.structure.resize import Cut
from secateur.structure.trace import trace
from secateur.structure.walk import Batch, Walk


def of(function, **shapes):
    """A module with random parameters, computing ``function(x, *parameters)``."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            generator = torch.Generator().manual_seed(0)
            for name, shape in shapes.items():
                setattr(self, name, nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.double)))

        def forward(self, x):
            return function(x, *(getattr(self, name) for name in shapes))

    return Net()


def last(x):
    """Outputs in the last dimension, one row for every place."""
    return x.reshape(-1, x.shape[-1])


def second(x):
    """Outputs in the second dimension: images."""
    return x.movedim(1, -1).flatten(0, -2)


READ = {
    "linear": (of(lambda x, w: F.linear(x, w), w=(5, 4)), (2, 3, 4), last),
    "matmul": (of(lambda x, w: x @ w, w=(4, 5)), (2, 3, 4), last),
    "matmul from the left": (of(lambda x, w: w @ x, w=(5, 4)), (2, 4, 3), lambda y: last(y.transpose(-1, -2))),
    "addmm": (of(lambda x, b, w: torch.addmm(0 * b, x, w), b=(5,), w=(4, 5)), (3, 4), last),
    "transposed parameter": (of(lambda x, w: F.linear(x, w.t()), w=(4, 5)), (3, 4), last),
    "part of a parameter": (of(lambda x, w: F.linear(x, w.chunk(3)[1]), w=(15, 4)), (3, 4), last),
    "some columns": (of(lambda x, w: F.linear(x, w[:, 2:]), w=(5, 6)), (3, 4), last),
    "conv1d": (of(lambda x, w: F.conv1d(x, w, stride=2, padding=1), w=(5, 4, 3)), (2, 4, 7), second),
    "conv2d": (of(lambda x, w: F.conv2d(x, w, stride=(2, 1), dilation=(1, 2)), w=(5, 4, 3, 2)), (2, 4, 7, 6), second),
    "same padding": (of(lambda x, w: F.conv2d(x, w, padding="same"), w=(5, 4, 2, 3)), (2, 4, 5, 6), second),
    "conv3d": (of(lambda x, w: F.conv3d(x, w, padding=1), w=(5, 4, 3, 3, 3)), (1, 4, 4, 3, 3), second),
    "no batch": (of(lambda x, w: F.conv2d(x, w), w=(5, 4, 3, 3)), (4, 5, 5), lambda y: y.flatten(1).T),
    "transposed conv": (
        of(lambda x, w: F.conv_transpose2d(x, w, stride=2, padding=1, output_padding=1), w=(4, 5, 3, 3)),
        (2, 4, 4, 5),
        second,
    ),
    "dilated transposed conv": (
        of(lambda x, w: F.conv_transpose1d(x, w, stride=3, padding=3, dilation=2), w=(4, 5, 3)),
        (2, 4, 5),
        second,
    ),
}  # fmt: skip

GROUPED = {
    "grouped conv": (of(lambda x, w: F.conv2d(x, w, padding=1, groups=3), w=(6, 2, 3, 3)), (2, 6, 5, 5), second),
    "grouped transposed conv": (
        of(lambda x, w: F.conv_transpose2d(x, w, stride=2, groups=3), w=(6, 2, 3, 3)),
        (2, 6, 5, 5),
        second,
    ),
    "batch of matrices": (
        of(lambda x, w: torch.bmm(x, w), w=(3, 4, 2)),
        (3, 5, 4),
        lambda y: y.transpose(0, 1).flatten(1),
    ),
}  # fmt: skip


def read(module: nn.Module, x: torch.Tensor) -> tuple[Readers, list[torch.Tensor]]:
    """The readers of a module, and what each computes of the patches of its input."""
    readers = find_readers(trace(module, (x,)))
    found = []
    for reader in readers.found:
        rows = torch.cat(list(reader.rows(x)))[:, reader.matrix]
        weight = module.get_parameter(reader.parameter).detach().flatten()[reader.entries]
        found.append(rows @ weight.T)
    return readers, found


@pytest.mark.parametrize("name", READ)
def test_a_matrix_times_what_it_reads_is_the_output(name):
    module, shape, flat = READ[name]
    (x,) = images(*shape)
    readers, found = read(module, x)
    assert len(found) == 1 and not readers.others
    assert torch.allclose(found[0], flat(module(x)), atol=1e-12)


@pytest.mark.parametrize("name", GROUPED)
def test_groups_are_matrices_of_their_own(name):
    module, shape, flat = GROUPED[name]
    (x,) = images(*shape)
    readers, found = read(module, x)
    assert len(found) == 3 and len({r.rows for r in readers.found}) == 1
    assert torch.allclose(torch.cat(found, dim=1), flat(module(x)), atol=1e-12)


def test_large_inputs_are_read_in_parts(monkeypatch):
    module, shape, flat = READ["conv2d"]
    monkeypatch.setattr("secateur.structure.readers._LARGEST_PATCHES", 1)
    (x,) = images(*shape)
    (reader,) = find_readers(trace(module, (x,))).found
    parts = list(reader.rows(x))
    assert len(parts) == len(x) and sum(map(len, parts)) == len(flat(module(x)))


def test_a_depthwise_convolution_reads_no_channels():
    readers = find_readers(trace(of(lambda x, w: F.conv2d(x, w, groups=4), w=(4, 1, 3, 3)), images(2, 4, 5, 5)))
    assert not readers.found and not readers.others


UNREAD = {
    "einsum": of(lambda x, w: torch.einsum("nc,oc->no", x, w), w=(5, 4)),
    "computed weight": of(lambda x, w: F.linear(x, w * w), w=(5, 4)),
    "its own input": of(lambda x, w: x @ (w @ w), w=(4, 4)),
    "also used otherwise": of(lambda x, w: F.linear(x, w) + w.sum(), w=(5, 4)),
    "two parts that overlap": of(lambda x, w: F.linear(x, w[:3]) + F.linear(x, w[1:4]), w=(5, 4)),
}


@pytest.mark.parametrize("name", UNREAD)
def test_what_is_no_plain_product_is_named(name):
    readers = find_readers(trace(UNREAD[name], images(3, 4)))
    assert not readers.found and {n for names in readers.others.values() for n in names} == {"w"}


def test_a_weight_that_is_applied_twice_has_two_readers_with_one_key():
    readers = find_readers(trace(of(lambda x, w: F.linear(torch.tanh(F.linear(x, w)), w), w=(4, 4)), images(3, 4)))
    assert len(readers.found) == 2 and len({r.weight_key for r in readers.found}) == 1


def test_a_tied_embedding_is_left_alone():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x):
            return self.head(torch.relu(self.embed(x)))

    readers = find_readers(trace(Tied(), (torch.tensor([[1, 2, 3]]),)))
    assert not readers.found and list(readers.others.values()) == [("embed.weight",)]


# -- walks -------------------------------------------------------------------------------------------------------------


def walked(module: nn.Module, inputs: tuple, heads: str, seed: int) -> tuple[float, float] | None:
    """Differences of a walk from the module, and of one in which readers have zeros for what leaves from the cut."""
    anatomy = traced_anatomy(trace(module, inputs), heads=heads)
    removed = anatomy.units_removed(choose(anatomy, 0.4, seed))
    cut, readers = Cut(anatomy.trace, removed), find_readers(anatomy.trace)
    try:
        graph = cut_graph(cut)
    except SecateurError:
        return None
    with torch.no_grad():
        dense = Walk(anatomy.trace, [Batch(anatomy.trace, inputs)]).run(lambda node, tensors: None)
        walk = Walk(anatomy.trace, [Batch(anatomy.trace, inputs, cut)], whole=readers.by_node)
        for reader in readers.found:
            gone = torch.from_numpy(~cut.kept(reader.labels)).repeat_interleave(reader.width)
            weight = walk.tensor(reader.parameter).clone().flatten()
            weight[reader.entries[:, gone]] = 0
            walk.changed[reader.parameter] = weight.reshape(walk.tensor(reader.parameter).shape)
        found = walk.run(lambda node, tensors: None)
        return difference(dense[0], module(*inputs)), difference(found[0], graph(*inputs))


@pytest.mark.parametrize("part", range(4))
def test_a_walk_gives_what_the_cut_network_gives(part):
    counts: Counter[str] = Counter()
    for seed in range(part, 40, 4):
        network = RandomNetwork(seed)
        module, inputs = randomised(network, seed), (network.example,)
        found = walked(module, inputs, HEADS[seed % 3], seed)
        counts["refused" if found is None else "walked"] += 1
        assert found is None or max(found) < 1e-9, f"{found}\n\n{network}"
    assert counts["refused"] <= 1
