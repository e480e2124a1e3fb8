"""Oracles 5 and 6 of SPA's sheet: which slices of which tensors leave together, worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cut_networks import anatomy_of, check, images, pruned, randomised
from secateur.structure.groups import TracedAnatomy

Slice = dict[tuple[str, int], list[int]]


def taken(anatomy: TracedAnatomy, group: str, unit: int) -> Slice:
    """(tensor, dim) → positions that leave with one unit."""
    return {(s.tensor, s.dim): sorted(s.index[unit].tolist()) for s in anatomy[group].slices}


def holding(anatomy: TracedAnatomy, tensor: str, dim: int, position: int) -> list[Slice]:
    """All that leaves with the units that one position of a tensor belongs to, unit by unit."""
    return [
        taken(anatomy, group.name, unit)
        for group in anatomy.groups
        if group.frozen is None
        for part in group.slices
        if (part.tensor, part.dim) == (tensor, dim)
        for unit in (part.index == position).any(dim=1).nonzero()[:, 0].tolist()
    ]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        return self.fc(self.b(h) + h)


def test_residual_net_couples_a_b_and_fc_and_nothing_else():
    anatomy = anatomy_of(Residual().double(), images(2, 5))
    assert [(g.name, g.units) for g in anatomy.groups] == [("a", 4)]
    everything = {("a.weight", 0), ("a.bias", 0), ("b.weight", 0), ("b.bias", 0), ("b.weight", 1), ("fc.weight", 1)}
    for unit in range(4):
        assert taken(anatomy, "a", unit) == {key: [unit] for key in everything}


class SwiGLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(6, 5, bias=False), nn.Linear(6, 5, bias=False)
        self.down = nn.Linear(5, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def test_swiglu_couples_gate_up_and_down():
    anatomy = anatomy_of(SwiGLU().double(), images(2, 3, 6))
    assert [(g.name, g.units) for g in anatomy.groups] == [("gate", 5)]
    everything = {("gate.weight", 0), ("up.weight", 0), ("down.weight", 1)}
    for unit in range(5):
        assert taken(anatomy, "gate", unit) == {key: [unit] for key in everything}


HEADS, LANES, REPEATS = 3, 4, 2
# biases would only repeat what the weights' rows say


class Attention(nn.Module):
    """``kv`` key-value heads, each read by ``heads / kv`` query heads, repeated as ``how`` says."""

    def __init__(self, heads: int, kv: int, how: str) -> None:
        super().__init__()
        self.heads, self.kv, self.how = heads, kv, how
        self.q = nn.Linear(7, heads * LANES, bias=False)
        self.k, self.v = nn.Linear(7, kv * LANES, bias=False), nn.Linear(7, kv * LANES, bias=False)
        self.o = nn.Linear(heads * LANES, 7, bias=False)

    def repeat(self, x: Tensor) -> Tensor:
        batch, kv, length, lanes = x.shape
        times = self.heads // self.kv
        if self.how == "interleave":
            return x.repeat_interleave(times, dim=1)
        if self.how == "expand":
            return x[:, :, None].expand(batch, kv, times, length, lanes).reshape(batch, kv * times, length, lanes)
        return x

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.q(x).view(batch, length, self.heads, LANES).transpose(1, 2)
        k = self.k(x).view(batch, length, self.kv, LANES).transpose(1, 2)
        v = self.v(x).view(batch, length, self.kv, LANES).transpose(1, 2)
        if self.how == "matmul":
            scores = q @ k.transpose(-1, -2) * LANES**-0.5
            out = scores.softmax(-1) @ v
        else:
            k, v = self.repeat(k), self.repeat(v)
            out = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.how == "flag")
        return self.o(out.transpose(1, 2).reshape(batch, length, self.heads * LANES))


def lanes_of(heads: list[int]) -> list[int]:
    return [h * LANES + lane for h in heads for lane in range(LANES)]


def lane_in(heads: int, lane: int) -> list[int]:
    return [h * LANES + lane for h in range(heads)]


@pytest.mark.parametrize("how", ["matmul", "fused"])
def test_mha_inner_couples_value_lanes_with_o_and_query_lanes_with_key_lanes(how):
    anatomy = anatomy_of(Attention(HEADS, HEADS, how).double(), images(2, 5, 7), heads="inner")
    for lane in range(LANES):
        same = lane_in(HEADS, lane)
        assert holding(anatomy, "v.weight", 0, lane) == [{("v.weight", 0): same, ("o.weight", 1): same}]
        assert holding(anatomy, "q.weight", 0, lane) == [{("q.weight", 0): same, ("k.weight", 0): same}]
        assert holding(anatomy, "k.weight", 0, lane) == holding(anatomy, "q.weight", 0, lane)


@pytest.mark.parametrize("how", ["matmul", "fused"])
def test_mha_outer_takes_whole_heads(how):
    anatomy = anatomy_of(Attention(HEADS, HEADS, how).double(), images(2, 5, 7), heads="outer")
    for head in range(HEADS):
        rows = lanes_of([head])
        whole = {("q.weight", 0): rows, ("k.weight", 0): rows, ("v.weight", 0): rows, ("o.weight", 1): rows}
        assert holding(anatomy, "q.weight", 0, head * LANES + 1) == [whole]
        assert holding(anatomy, "o.weight", 1, head * LANES) == [whole]


GQA = ["interleave", "expand", "flag"]


@pytest.mark.parametrize("how", GQA)
def test_gqa_inner_couples_a_lane_of_all_value_heads_with_that_of_all_query_heads(how):
    anatomy = anatomy_of(Attention(HEADS * REPEATS, HEADS, how).double(), images(2, 5, 7), heads="inner")
    for lane in range(LANES):
        few, many = lane_in(HEADS, lane), lane_in(HEADS * REPEATS, lane)
        assert holding(anatomy, "v.weight", 0, lane) == [{("v.weight", 0): few, ("o.weight", 1): many}]
        assert holding(anatomy, "q.weight", 0, lane) == [{("q.weight", 0): many, ("k.weight", 0): few}]


@pytest.mark.parametrize("how", GQA)
def test_gqa_outer_takes_a_key_value_head_with_its_query_heads(how):
    anatomy = anatomy_of(Attention(HEADS * REPEATS, HEADS, how).double(), images(2, 5, 7), heads="outer")
    for head in range(HEADS):
        queries = lanes_of([head * REPEATS + r for r in range(REPEATS)])
        whole = {
            ("q.weight", 0): queries,
            ("o.weight", 1): queries,
            ("k.weight", 0): lanes_of([head]),
            ("v.weight", 0): lanes_of([head]),
        }
        assert holding(anatomy, "k.weight", 0, head * LANES) == [whole]


@pytest.mark.parametrize("how", ["expand", "flag"])
def test_gqa_outer_takes_the_same_query_head_of_every_group(how):
    anatomy = anatomy_of(Attention(HEADS * REPEATS, HEADS, how).double(), images(2, 5, 7), heads="outer")
    for repeat in range(REPEATS):
        queries = lanes_of([head * REPEATS + repeat for head in range(HEADS)])
        found = holding(anatomy, "q.weight", 0, repeat * LANES)
        assert {("q.weight", 0): queries, ("o.weight", 1): queries} in found and len(found) == 2


@pytest.mark.parametrize("how", GQA)
def test_gqa_never_takes_one_query_head_of_one_group_alone(how):
    # the groups of query heads would differ in size: what may leave is one of every group, or none
    anatomy = anatomy_of(Attention(HEADS * REPEATS, HEADS, how).double(), images(2, 5, 7), heads="outer")
    for group in anatomy.groups:
        if group.frozen:
            continue
        for unit in range(group.units):
            rows = taken(anatomy, group.name, unit).get(("q.weight", 0), [])
            lost = [len({r // LANES for r in rows} & {h * REPEATS + r for r in range(REPEATS)}) for h in range(HEADS)]
            assert set(lost) <= {0, REPEATS} or len(set(lost)) == 1, (group.name, lost)


@pytest.mark.parametrize("how", ["matmul", "fused", *GQA])
@pytest.mark.parametrize("heads", ["inner", "outer", "both"])
def test_attention_computes_what_the_reference_computes(how, heads):
    module = randomised(Attention(HEADS * (REPEATS if how in GQA else 1), HEADS, how))
    check(pruned(module, images(2, 5, 7), heads=heads))


class Flattened(nn.Module):
    """A convolution of 4 channels on 8×8, read by a linear layer."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.conv, self.fc, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(256, 2), last

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.fc((x.permute(0, 2, 3, 1) if self.last else x).flatten(1))


@pytest.mark.parametrize("last", [True, False])
def test_flattened_channels_are_found_where_they_lie(last):
    anatomy = anatomy_of(Flattened(last).double(), images(2, 3, 8, 8))
    assert [(g.name, g.units) for g in anatomy.groups] == [("conv", 4)]
    columns = [4 * p + 1 for p in range(64)] if last else list(range(64, 128))
    assert taken(anatomy, "conv", 1) == {("conv.weight", 0): [1], ("conv.bias", 0): [1], ("fc.weight", 1): columns}
    check(pruned(randomised(Flattened(last)), images(2, 3, 8, 8), {"conv": [1, 3]}))
