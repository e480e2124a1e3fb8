"""Laws of the allocators."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.allocate import GlobalAllocator, ManualAllocator, RoundedAllocator, UniformAllocator
from secateur.allocate.units import Limits, bundles
from secateur.errors import BudgetError
from secateur.structure import Cost, Group


def model(layers=3, heads=4, neurons=24, balance=1):
    groups = []
    for layer in range(layers):
        kind = "kv_head" if balance == 1 else "head"
        groups.append(Group(f"layers.{layer}.attention", kind, layer, heads, Cost(12, 12, 48), balance=balance))
        groups.append(Group(f"layers.{layer}.mlp", "neuron", layer, neurons, Cost(3, 3, 12)))
    return groups


def scores_of(groups, seed):
    generator = torch.Generator().manual_seed(seed)
    return {g.name: torch.randn(g.units, generator=generator) for g in groups}


def cost(kept, groups):
    return sum(g.cost.params * len(kept[g.name]) for g in groups)


TOTAL = 3 * (4 * 12 + 24 * 3)
ALLOCATORS = [GlobalAllocator, UniformAllocator, RoundedAllocator]


@pytest.mark.parametrize("allocator", ALLOCATORS)
@given(sparsity=st.floats(0, 0.75), seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_budget_is_met_within_one_bundle(allocator, sparsity, seed):
    groups = model()
    kept = allocator(sparsity).allocate(scores_of(groups, seed), groups, TOTAL, Limits())
    slack = 6 if allocator is GlobalAllocator else 1.5 * 3
    assert abs(cost(kept, groups) - (1 - sparsity) * TOTAL) <= slack + 1e-6


@pytest.mark.parametrize("allocator", ALLOCATORS)
@given(
    pair=st.tuples(st.floats(0, 0.7), st.floats(0, 0.7)), seed=st.integers(0, 1000), round_to=st.sampled_from([1, 4])
)
@settings(max_examples=60, deadline=None)
def test_a_larger_budget_costs_no_less(allocator, pair, seed, round_to):
    groups, limits = model(), Limits(round_to=round_to)
    low, high = sorted(pair)
    more, less = (allocator(s).allocate(scores_of(groups, seed), groups, TOTAL, limits) for s in (low, high))
    assert cost(less, groups) <= cost(more, groups)
    if allocator is GlobalAllocator:
        for name in more:
            assert set(less[name].tolist()) <= set(more[name].tolist())


@given(seed=st.integers(0, 1000), sparsity=st.floats(0.05, 0.6))
@settings(max_examples=40, deadline=None)
def test_kept_units_follow_a_permutation(seed, sparsity):
    groups = model()
    scores = scores_of(groups, seed)
    order = {g.name: torch.randperm(g.units, generator=torch.Generator().manual_seed(seed)) for g in groups}
    plain = GlobalAllocator(sparsity).allocate(scores, groups, TOTAL, Limits())
    moved = GlobalAllocator(sparsity).allocate({n: s[order[n]] for n, s in scores.items()}, groups, TOTAL, Limits())
    for name in scores:
        assert set(order[name][moved[name]].tolist()) == set(plain[name].tolist())


@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_an_impossible_budget_is_refused_with_what_is_possible(allocator):
    groups = model()
    with pytest.raises(BudgetError, match=r"can't remove 95\.0% of the params: .* at most \d+\.\d% can go"):
        allocator(0.95).allocate(scores_of(groups, 0), groups, TOTAL, Limits(min_keep=2))


@pytest.mark.parametrize("allocator", ALLOCATORS)
def test_a_remainder_that_is_all_that_can_leave_is_no_whole_bundle(allocator):
    groups = [Group(f"layers.{layer}.mlp", "neuron", layer, 40, Cost(1, 1, 1)) for layer in range(2)]
    limits, scores = Limits(round_to=32, min_keep=2), scores_of(groups, 0)
    with pytest.raises(BudgetError, match=r"can't remove 35\.0% of the params: .* at most 20\.0% can go"):
        allocator(0.35).allocate(scores, groups, 80, limits)
    kept = allocator(0.25).allocate(scores, groups, 80, limits)
    assert [len(units) for units in kept.values()] == [32, 32]


def test_uniform_without_fill_is_the_published_rule():
    groups = model(heads=3)
    kept = UniformAllocator(0.2, fill=False).allocate(scores_of(groups, 0), groups, 3 * (36 + 72), Limits())
    assert {len(k) for n, k in kept.items() if n.endswith("attention")} == {3}
    assert {len(k) for n, k in kept.items() if n.endswith("mlp")} == {24 - int(24 * 0.2)}


def test_uniform_takes_another_head_where_neurons_do_not_suffice():
    groups = model(heads=4, neurons=4)
    total = 3 * (48 + 12)
    kept = UniformAllocator(0.45).allocate(scores_of(groups, 0), groups, total, Limits())
    assert {len(k) for n, k in kept.items() if n.endswith("attention")} == {2}
    assert abs(cost(kept, groups) - 0.55 * total) <= 3 * 1.5


def test_query_heads_leave_in_step_best_ones_staying():
    group = Group("layers.0.attention", "head", 0, 6, Cost(5), balance=2)
    ordered = bundles(group, torch.tensor([3.0, 1, 2, 0, 5, 4]), Limits())
    assert [b.units.tolist() for b in ordered] == [[0, 4], [2, 5], [1, 3]]
    assert [b.cost for b in ordered] == [10, 10, 10]
    assert [b.value for b in ordered] == [4.0, 3.0, 0.5]


def test_neurons_leave_in_multiples_and_a_remainder_goes_first():
    group = Group("layers.0.mlp", "neuron", 0, 10, Cost(1))
    ordered = bundles(group, torch.arange(10.0), Limits(round_to=4))
    assert [b.units.tolist() for b in ordered] == [[9, 8, 7, 6], [5, 4, 3, 2], [1, 0]]


def test_manual_mode_removes_exactly_the_heads_and_neurons_that_it_states():
    groups = model()
    scores = scores_of(groups, 1)
    per_layer = ManualAllocator(0.3, 3, "layer").allocate(scores, groups, TOTAL, Limits())
    overall = ManualAllocator(0.3, 3, "global").allocate(scores, groups, TOTAL, Limits())
    assert [len(per_layer[f"layers.{i}.attention"]) for i in range(3)] == [3, 3, 3]
    assert sum(len(overall[f"layers.{i}.attention"]) for i in range(3)) == 9
    neurons = int((0.3 * TOTAL - 3 * 12) / 3)
    assert sum(24 - len(overall[f"layers.{i}.mlp"]) for i in range(3)) == neurons
    with pytest.raises(BudgetError, match="lower remove_heads"):
        ManualAllocator(0.1, 9, "global").allocate(scores, groups, TOTAL, Limits())
    with pytest.raises(BudgetError, match="can't remove 12 kv_head units"):
        ManualAllocator(0.6, 12, "global").allocate(scores, groups, TOTAL, Limits())


def test_layers_of_unequal_width_lose_their_share_beside_a_number_of_heads():
    def of(layer: int, neurons: int) -> list[Group]:
        head = Group(f"layers.{layer}.attention", "kv_head", layer, 4, Cost(params=10))
        return [head, Group(f"layers.{layer}.mlp", "neuron", layer, neurons, Cost(params=1))]

    # an earlier cut has taken most neurons of the first layer, and the attention of the third
    groups = [*of(0, 20), *of(1, 60), of(2, 40)[1]]
    scores = {g.name: torch.arange(float(g.units)) for g in groups}
    kept = ManualAllocator(0.4, 3, "layer").allocate(scores, groups, 200, Limits())
    # 24 of 60, 40 of 100 and 16 of 40 parameters leave, of which a head takes 10
    assert {name: len(units) for name, units in kept.items()} == {
        "layers.0.attention": 3,
        "layers.0.mlp": 6,
        "layers.1.attention": 3,
        "layers.1.mlp": 30,
        "layers.2.mlp": 24,
    }
