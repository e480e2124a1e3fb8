"""The integer programme over variants: by hand, against enumeration, and the laws of the allocator."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.allocate import Budget, ProgrammeAllocator, choose, measured_losses, score_losses
from secateur.allocate.units import Limits, bundles
from secateur.errors import BudgetError, UsageError
from secateur.structure import Cost, Group

# (score, cost) of three variants of three blocks
A, B, C = ((0, 10), (1, 6), (3, 3)), ((0, 10), (0.5, 6), (4, 3)), ((0, 10), (2, 6), (2.5, 3))


def split(*blocks):
    return (
        [np.array([s for s, *_ in block], dtype=float) for block in blocks],
        [np.array([cost for _, *cost in block], dtype=float) for block in blocks],
    )


@pytest.mark.parametrize(("limit", "score"), [(30, 0), (22, 1.5), (19, 3.0), (16, 4.0), (9, 9.5), (8, None)])
def test_three_blocks_by_hand(limit, score):
    losses, costs = split(A, B, C)
    chosen = choose(losses, costs, np.array([float(limit)]))
    found = None if chosen is None else sum(one[at] for one, at in zip(losses, chosen, strict=True))
    assert found == score


def test_the_variants_by_hand_are_those_of_the_sheet():
    losses, costs = split(A, B, C)
    found = [choose(losses, costs, np.array([limit])) for limit in (22.0, 19.0, 16.0)]
    assert found == [[1, 1, 0], [0, 1, 2], [1, 1, 2]]


def enumerated(losses, costs, limits):
    """The least sum of losses over all choices that meet the limits, or None."""
    found = [
        sum(one[at] for one, at in zip(losses, choice, strict=True))
        for choice in product(*(range(len(one)) for one in losses))
        if (sum(one[at] for one, at in zip(costs, choice, strict=True)) <= limits).all()
    ]
    return min(found, default=None)


@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    budgets=st.integers(1, 3),
    tightness=st.floats(0.1, 1),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=60, deadline=None)
def test_no_other_choice_loses_less(sizes, budgets, tightness, seed):
    random = np.random.default_rng(seed)
    losses = [random.integers(0, 100, n).astype(float) for n in sizes]
    costs = [random.integers(1, 50, (n, budgets)).astype(float) for n in sizes]
    limits = np.floor(tightness * np.sum([one.max(axis=0) for one in costs], axis=0))
    chosen, least = choose(losses, costs, limits), enumerated(losses, costs, limits)
    if least is None:
        assert chosen is None
        return
    assert chosen is not None
    assert (np.sum([one[at] for one, at in zip(costs, chosen, strict=True)], axis=0) <= limits).all()
    assert sum(one[at] for one, at in zip(losses, chosen, strict=True)) == pytest.approx(least)
    # a budget more never loses less
    alone = choose(losses, [one[:, :1] for one in costs], limits[:1])
    assert alone is not None
    assert sum(one[at] for one, at in zip(losses, alone, strict=True)) <= least + 1e-9


def model(layers=3, heads=4, neurons=24):
    groups = []
    for layer in range(layers):
        groups.append(Group(f"layers.{layer}.attention", "kv_head", layer, heads, Cost(12, 12, 48, 8)))
        groups.append(Group(f"layers.{layer}.mlp", "neuron", layer, neurons, Cost(3, 3, 12)))
    return groups


def budget(groups, name, fraction, dense=None):
    each = {g.name: float(getattr(g.cost, name)) for g in groups}
    saved = {g.name: each[g.name] * np.arange(g.units, -1, -1.0) for g in groups}
    return Budget(name, fraction, dense or sum(each[g.name] * g.units for g in groups), saved)


def scores_of(groups, seed):
    generator = torch.Generator().manual_seed(seed)
    return {g.name: torch.randn(g.units, generator=generator) for g in groups}


def allocate(groups, scores, *budgets, uniform=False, **limits):
    allocator = ProgrammeAllocator(budgets, score_losses(scores, per_parameter=True), uniform)
    return allocator.allocate(scores, groups, 0, Limits(**limits))


def cost(kept, groups, name):
    return sum(getattr(g.cost, name) * len(kept[g.name]) for g in groups)


@given(
    params=st.floats(0.4, 1), kv=st.floats(0.3, 1), seed=st.integers(0, 1000), round_to=st.sampled_from([1, 4]),
    uniform=st.booleans(),
)  # fmt: skip
@settings(max_examples=30, deadline=None)
def test_both_budgets_are_met_by_the_best_units(params, kv, seed, round_to, uniform):
    groups = model()
    scores, both = scores_of(groups, seed), [budget(groups, "params", params), budget(groups, "kv_bytes", kv)]
    kept = allocate(groups, scores, *both, uniform=uniform, round_to=round_to)
    for limit in both:
        assert cost(kept, groups, limit.name) <= limit.fraction * limit.dense * (1 + 1e-9)
    for group in groups:
        best = torch.cat([b.units for b in bundles(group, scores[group.name], Limits(round_to=round_to))])
        assert set(kept[group.name].tolist()) == set(best[: len(kept[group.name])].tolist())
        assert group.kind != "neuron" or len(kept[group.name]) % round_to == 0
    if uniform:
        assert len({len(kept[g.name]) for g in groups if g.kind == "neuron"}) == 1
        assert len({len(kept[g.name]) for g in groups if g.kind == "kv_head"}) == 1


def test_one_budget_keeps_what_a_global_ranking_keeps():
    """With one unit of cost per parameter and losses per parameter, the programme is a knapsack of equal densities."""
    groups = [g for g in model() if g.kind == "neuron"]
    scores = scores_of(groups, 3)
    kept = allocate(groups, scores, budget(groups, "params", 0.5))
    flat = torch.cat([scores[g.name] for g in groups])
    threshold = flat.sort(descending=True).values[len(flat) // 2 - 1]
    for group in groups:
        assert kept[group.name].tolist() == (scores[group.name] >= threshold).nonzero().flatten().tolist()


def test_nothing_leaves_when_all_may_stay():
    groups = model()
    kept = allocate(groups, scores_of(groups, 0), budget(groups, "params", 1.0))
    assert all(len(kept[g.name]) == g.units for g in groups)


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        (
            {"params": 0.05},
            r"^budget params=0\.05 can't be met: with at least 1 unit\(s\) kept in every group the model takes at"
            r" least 0\.125 of its params$",
        ),
        ({"params": 0.9, "kv_bytes": 0.2}, r"^budget kv_bytes=0\.2 can't be met: .* at least 0\.250 of its kv_bytes$"),
    ],
)
def test_an_infeasible_budget_is_named_with_what_is_feasible(asked, sentence):
    groups = model()
    limits = [budget(groups, name, fraction) for name, fraction in asked.items()]
    with pytest.raises(BudgetError, match=sentence):
        allocate(groups, scores_of(groups, 0), *limits)
    with pytest.raises(BudgetError, match=sentence):
        ProgrammeAllocator(tuple(limits), lambda *_: np.zeros(1)).check(groups, Limits())


def test_budgets_that_only_exclude_each_other_say_so():
    groups = [Group("layers.0.mlp", "neuron", 0, 2, Cost(1, 1, 1))]
    # what is cheap in one is dear in the other
    up = Budget("macs", 0.5, 2.0, {"layers.0.mlp": np.array([2.0, 1.0, 0.0])})
    down = Budget("latency", 0.5, 2.0, {"layers.0.mlp": np.array([2.0, 0.0, 1.0])})
    with pytest.raises(
        BudgetError,
        match=r"^budgets macs=0\.5 and latency=0\.5 can't be met together: .* and macs=0\.5 the model takes at least"
        r" 1\.000 of its latency$",
    ):
        allocate(groups, scores_of(groups, 0), up, down)


def test_layers_of_other_sizes_can_not_become_equal():
    groups = [*model(1), Group("layers.1.mlp", "neuron", 1, 20, Cost(3, 3, 12))]
    with pytest.raises(UsageError, match=r"layers\.1\.mlp has 20 units and layers\.0\.mlp has 24"):
        allocate(groups, scores_of(groups, 0), budget(groups, "params", 0.5), uniform=True)


def test_measured_losses_are_monotone_and_pass_through_the_measurements():
    group = Group("layers.0.mlp", "neuron", 0, 10, Cost(1, 1, 1))
    ordered = bundles(group, torch.arange(10.0), Limits())
    # at 7 less was lost than at 9, by chance
    found = measured_losses({group.name: {2: 4.0, 7: 0.1, 9: 0.2}})(group, ordered, range(1, 11))
    assert (np.diff(found) <= 0).all()
    assert found[1] == 4.0 and found[6] == found[8] == 0.2 and found[9] == 0.0
