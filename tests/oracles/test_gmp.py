"""Oracles of GMP: the ramp, masks by hand, update steps, blocks and patterns."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import secateur as sc
from secateur.allocate import Cosine, Exponential, Polynomial, Updates, keep_highest, kept_counts
from secateur.errors import OptionError, UsageError
from secateur.methods import make_method
from sparse_training import RAMP, network, same, sgd, sparsifier, train


def masked(weight: list[list[float]], sparsity: float, **options) -> list[list[int]]:
    """The mask of one matrix pruned at once."""
    module = nn.Linear(len(weight[0]), len(weight), bias=False)
    module.weight.data.copy_(torch.tensor(weight))
    given = {"ramp": "constant", "end": 1, "every": 1, **options}
    return sc.Sparsifier(module, method="gmp", sparsity=sparsity, **given).masks["weight"].int().tolist()


def test_the_ramp_of_the_paper():
    schedule = make_method("gmp", {"begin": 100, "end": 200, "every": 10}).schedule()
    assert [round(schedule(100 + 10 * k), 4) for k in range(11)] == RAMP
    assert schedule(0) == 0 and schedule(10**6) == 0.9
    assert Polynomial(0.5, 0.8, 0, 10)(5) == pytest.approx(0.8 - 0.3 * 0.125) == pytest.approx(0.7625)


def test_masks_by_hand():
    assert masked([[1, -2, 3, -4]], 0.5) == [[0, 0, 1, 1]]
    # something always stays
    assert masked([[1, -2, 3, -4]], 0.9) == [[0, 0, 0, 1]]
    # all equal: as many as asked leave, where the threshold of the maintained code would keep all
    assert masked([[1, 1, 1, 1]], 0.5) == [[1, 1, 0, 0]]


def test_update_steps():
    assert [t for t in range(100) if Updates(10, 50, 20).due(t)] == [10, 30, 50]
    # the ramp ends where it should, whether or not ``every`` meets it
    assert [t for t in range(100) if Updates(10, 45, 20).due(t)] == [10, 30, 45]
    assert list(Updates(0, None, 3).steps(7)) == [0, 3, 6]


def test_blocks_leave_whole_and_patterns_leave_n_of_m():
    torch.manual_seed(0)
    weight = torch.randn(6, 16).tolist()
    blocks = torch.tensor(masked(weight, 0.5, block="1x4")).reshape(6, 4, 4).sum(-1)
    assert set(blocks.flatten().tolist()) == {0, 4} and int((blocks == 4).sum()) == 12
    means = torch.tensor(weight).abs().reshape(6, 4, 4).mean(-1)
    assert float(means[blocks == 4].min()) > float(means[blocks == 0].max())
    runs = torch.tensor(masked(weight, 0.5, pattern="2:4")).reshape(6, 4, 4).sum(-1)
    assert set(runs.flatten().tolist()) == {2}
    largest = torch.tensor(masked(weight, 0.5, block="4x4", pooling="max"))
    # 6 rows make one block of four and one of two
    assert set(largest[:4].reshape(4, 4, 4).sum((0, 2)).tolist()) <= {0, 16}


def test_a_pattern_grows_with_the_ramp():
    module = nn.Linear(8, 3, bias=False)
    pruned = sc.Sparsifier(module, method="gmp", pattern="2:4", ramp="polynomial", power=1, begin=1, end=3, every=1)
    found = []
    for _ in range(3):
        pruned.step()
        found.append(set(pruned.masks["weight"].reshape(3, 2, 4).sum(-1).flatten().tolist()))
    assert found == [{4}, {3}, {2}] and pruned.sparsity == 0.5


def test_convolutions_have_their_pattern_along_input_channels():
    module = nn.Conv2d(8, 3, 3, bias=False)
    mask = sc.Sparsifier(module, method="gmp", pattern="2:4", ramp="constant", end=1, every=1).masks["weight"]
    assert set(mask.reshape(3, 2, 4, 3, 3).sum(2).flatten().tolist()) == {2}


@settings(max_examples=40)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.floats(0, 0.99), st.floats(0, 0.99), st.integers(0, 99))
def test_masks_are_nested_and_never_take_too_much(sizes, one, other, seed):
    generator = torch.Generator().manual_seed(seed)
    # integers, so that there are ties
    scores = {str(i): torch.randint(0, 5, (size,), generator=generator).float() for i, size in enumerate(sizes)}
    less, more = sorted((one, other))
    for scope in ("uniform", "global", "erk"):
        loose, tight = (keep_highest(scores, s, scope=scope) for s in (less, more))
        assert sum(int(m.sum()) for m in tight.values()) >= sum(sizes) * (1 - more) - 1e-5
        if scope != "erk":
            assert all(not (tight[name] & ~loose[name]).any() for name in scores)
    floored = keep_highest(scores, more, scope="global", floor=0.3)
    assert all(int(floored[n].sum()) >= 0.3 * len(s) - 1e-5 for n, s in scores.items())


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=5), st.floats(0, 0.98))
def test_counts_by_erk_add_up(shapes, sparsity):
    named = {str(i): shape for i, shape in enumerate(shapes)}
    counts, total = kept_counts(named, sparsity, "erk"), sum(a * b for a, b in shapes)
    assert total * (1 - sparsity) - 1e-5 <= sum(counts.values()) < total * (1 - sparsity) + 1
    assert all(0 <= counts[name] <= a * b for name, (a, b) in named.items())


@given(st.floats(0, 0.5), st.floats(0.5, 0.99), st.integers(0, 20), st.integers(1, 50))
def test_schedules_are_monotone_and_hit_both_ends(first, last, begin, length):
    for schedule in (Polynomial(first, last, begin, begin + length), Exponential(first, last, begin, begin + length)):
        values = [schedule(t) for t in range(begin + length + 5)]
        assert values[begin] == pytest.approx(first) and values[begin + length] == last == values[-1]
        assert all(b >= a - 1e-12 for a, b in pairwise(values))
    falling = Cosine(last, 0.0, length)
    assert falling(0) == last and falling(length) == 0 == falling(length + 9)


def test_by_hand_over_three_updates():
    """The naive loop: at every update the lowest of each layer are zero, in between zeros stay zeros."""
    module, naive = network(), network()
    optimizer, other = sgd(module), sgd(naive)
    train(module, optimizer, sparsifier(module, optimizer, "gmp", sparsity=0.7))
    schedule, names = Polynomial(0.0, 0.7, 2, 8), ("0.weight", "4.weight", "6.weight")
    masks = {name: torch.ones_like(naive.get_parameter(name)) for name in names}

    def after(step: int) -> None:
        for name in names:
            weight = naive.get_parameter(name)
            weight.data *= masks[name]
            if step in (2, 4, 6, 8):
                stay = math.ceil(weight.numel() * (1 - schedule(step)) - 1e-6)
                masks[name] = torch.zeros_like(weight).flatten().scatter(
                    0, weight.detach().abs().flatten().topk(stay).indices, 1.0
                ).reshape(weight.shape)  # fmt: skip
                weight.data *= masks[name]
            other.state[weight]["momentum_buffer"] *= masks[name]

    train(naive, other, None, seen=after)
    assert same(module, naive)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"begin": 20, "end": 10}, r"gmp: the schedule ends at step 10, before it begins at step 20"),
        ({}, r"gmp needs end \(step of the last update\) or steps \(length of the training\)"),
        ({"end": 20, "steps": 10}, r"gmp: end is step 20, but the training has 10 steps"),
        ({"end": 20, "every": 30}, r"gmp: every is 30 steps, but from begin to end there are 20"),
        ({"end": 200, "initial": 0.95}, r"gmp: the sparsity can't go down, from initial 0.95 to 0.9"),
        ({"end": 200, "block": "1"}, r"block must be ROWSxCOLUMNS such as 1x4, got '1'"),
        ({"end": 200, "pattern": "2:4", "scope": "global"}, r"gmp: a pattern says what competes"),
        (
            {"end": 200, "pattern": "2:4", "initial": 0.6},
            r"gmp: the sparsity can't go down, from initial 0.6 to pattern",
        ),
        ({"end": 200, "every": 0}, r"gmp: every must lie in \[1, inf\), got 0"),
        ({"end": 200, "sparsity": 1.0}, r"gmp: sparsity must lie in \[0, 1\), got 1.0"),
        ({"end": 200, "evry": 1}, r"gmp has no option 'evry'; did you mean 'every'\?"),
    ],
)
def test_bad_options_are_one_sentence(options, message):
    with pytest.raises(OptionError, match=message):
        sc.Sparsifier(network(), method="gmp", **options)


def test_a_run_of_a_pattern_lies_within_a_group_of_a_transposed_convolution():
    # an output reads four inputs of eight, or six of twelve, of which a run would reach into the other group
    mask = sc.Sparsifier(
        nn.ConvTranspose2d(8, 6, 3, groups=2), method="gmp", pattern="2:4", ramp="constant", end=1, every=1
    ).masks["weight"]
    assert (mask.reshape(2, 4, 3, 3, 3).sum(dim=1) == 2).all()
    with pytest.raises(UsageError, match=r"weight has 6 inputs, which is no multiple of 4"):
        sc.Sparsifier(
            nn.ConvTranspose2d(12, 6, 3, groups=2), method="gmp", pattern="2:4", ramp="constant", end=1, every=1
        )


def test_blocks_and_patterns_name_the_layers_that_cannot_have_them():
    for options in ({"block": "1x4"}, {"pattern": "3:7"}):
        with pytest.raises(UsageError, match=r"exclude=\['0.weight'\]"):
            sc.Sparsifier(network(), method="gmp", ramp="constant", end=1, every=1, **options)
