"""Oracles of tyr: local pruning against lstsq and a second implementation, the laws of the search, and the whole."""

from __future__ import annotations

import copy
from collections import Counter
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

import secateur as sc
import secateur.engine.supernet
from families import LAYOUTS, make_tiny, tiny_ids
from runs import plan_for
from secateur.allocate import Grid, even_start
from secateur.allocate.levels import rungs_of
from secateur.allocate.units import Limits
from secateur.criteria.fitness import CrossEntropy, FullKL, SparseKL
from secateur.engine.searching import LevelTrials, level_weight
from secateur.engine.supernet import expectation_weights
from secateur.errors import BudgetError, DataError, OptionError, UnsupportedModelError, UsageError
from secateur.methods import Target, make_method
from secateur.methods.structure.tyr import Tyr
from secateur.models.decoders import decoder_anatomy
from secateur.models.saving import plain
from secateur.observe import Gram
from secateur.ranks import Ranks
from secateur.report.build import removed_fraction
from secateur.search import Evolution, shifted
from secateur.solver import Curvature, in_rounds, refit_columns
from secateur.structure import Cost, Group

DOUBLE = torch.float64
IDS = tiny_ids(windows=8, length=16)
QUICK = {"generations": 2, "offspring": 3, "iterations": 2, "stage_tokens": "16,48", "survivors": "2"}


def data(outputs=6, inputs=20, tokens=300, seed=0, mixed=True):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=DOUBLE)

    x = 0.5 * normal(tokens, inputs)
    return normal(outputs, inputs), x + normal(tokens, 8) @ normal(8, inputs) / 8**0.5 if mixed else x


def seen_of(x):
    gram = Gram()
    gram.update(x.reshape(3, -1, x.shape[1]))
    return {"gram": gram}


def target(w, kind="neuron", width=1):
    return Target("m", kind, 0, w, torch.arange(w.shape[1]).reshape(-1, width))


def level(w, x, removed, *, kind="neuron", width=1, balance=1, **options):
    """(units that leave, new weight) of one level."""
    method = make_method("tyr", options)
    (found,), notes = method.levels_of(target(w, kind, width), seen_of(x), [removed], balance)
    assert int(found[0].sum()) == removed and not notes
    return found


def official(w_OI, x, groups, removed, rounds, first_order="signed", damping=0.01):
    """The released function, retyped line by line: [inputs, outputs], inverses where the solver has factors."""
    W = w_OI.T.clone()
    H = x.T @ x
    W[H.diagonal() == 0] = 0
    H += damping * H.diagonal().mean() * torch.eye(len(H), dtype=DOUBLE)
    G, inverse = H @ W, torch.linalg.inv(H)
    size = len(W) // groups
    gone = torch.zeros(groups, dtype=torch.bool)
    base, extra = divmod(removed, min(rounds, removed))
    for take in [base + (i < extra) for i in range(min(rounds, removed))]:
        values = []
        for g in range(groups):
            at = slice(g * size, (g + 1) * size)
            curved = (W[at] * (torch.linalg.inv(inverse[at, at]) @ W[at] / 2)).sum() if not gone[g] else 0.0
            linear = {"signed": W[at] * G[at], "abs": (W[at] * G[at]).sum(dim=1).abs(), "off": 0 * W[at]}[first_order]
            values.append(float(curved + linear.sum()) + 1e20 * bool(gone[g]))
        picked = torch.tensor(values).argsort()[:take]
        rows = (picked[:, None] * size + torch.arange(size)).flatten()
        solved = torch.linalg.inv(inverse[rows][:, rows])
        W = W - inverse[:, rows] @ solved @ W[rows]
        W[rows] = 0
        inverse = inverse - inverse[:, rows] @ solved @ inverse[rows]
        inverse[rows], inverse[:, rows] = 0, 0
        gone[picked] = True
    kept = ~gone.repeat_interleave(size)
    pruned = torch.zeros_like(W)
    pruned[kept] = torch.linalg.inv(H[kept][:, kept]) @ G[kept]
    return gone, pruned.T


@pytest.mark.parametrize("first_order", ["signed", "abs", "off"])
@pytest.mark.parametrize(
    ("kind", "width", "removed", "rounds"), [("neuron", 1, 11, 16), ("neuron", 1, 10, 4), ("kv_head", 4, 2, 1)]
)
def test_a_level_is_what_the_released_function_gives(first_order, kind, width, removed, rounds):
    for seed in range(6):
        w, x = data(seed=seed)
        options = {"neuron_rounds": rounds} if kind == "neuron" else {"head_rounds": rounds}
        gone, weight = level(w, x, removed, kind=kind, width=width, first_order=first_order, **options)
        theirs, pruned = official(w, x, 20 // width, removed, rounds, first_order)
        assert torch.equal(gone, theirs)
        torch.testing.assert_close(weight, pruned, rtol=1e-9, atol=1e-9)


def test_what_was_never_active_leaves_first_and_takes_nothing_along():
    w, x = data()
    x[:, [3, 7]] = 0
    gone, weight = level(w, x, 2)
    assert gone.nonzero().flatten().tolist() == [3, 7]
    # nothing is lost, but for the damping that is added to both sides alike
    torch.testing.assert_close(weight[:, ~gone], w[:, ~gone])


def test_the_refit_is_least_squares_and_with_damping_a_ridge():
    w, x = data()
    gone, weight = level(w, x, 8, damping=0.0)
    kept = ~gone
    solution = torch.linalg.lstsq(x[:, kept], x @ w.T).solution
    torch.testing.assert_close(weight[:, kept].T, solution, rtol=1e-8, atol=1e-8)
    assert not weight[:, gone].any()
    gone, weight = level(w, x, 8, damping=0.3)
    kept, h = ~gone, x.T @ x
    ridge = 0.3 * h.diagonal().mean()
    right = (h @ w.T + ridge * w.T)[kept]
    wanted = torch.linalg.solve(h[kept][:, kept] + ridge * torch.eye(12, dtype=DOUBLE), right)
    torch.testing.assert_close(weight[:, kept].T, wanted, rtol=1e-8, atol=1e-8)


def test_twice_the_loss_is_the_squared_error_up_to_a_constant():
    w, x = data()
    problem = Curvature.of(x.T @ x, 0.0).problem(w)
    gone = in_rounds(problem, torch.arange(20)[:, None], 8, rounds=4, first_order="signed")
    pruned = refit_columns(problem, gone)
    error = float((x @ (w - pruned).T).square().sum())
    constant = float((w * (w @ (x.T @ x))).sum())
    assert 2 * problem.loss(pruned) + constant == pytest.approx(error, rel=1e-9)


def test_nothing_removed_is_the_dense_weight_and_everything_is_zero():
    w, x = data()
    gone, weight = level(w, x, 0)
    # None: the weight stays as it is, to the last bit
    assert weight is None and not gone.any()
    gone, weight = level(w, x, 20)
    assert gone.all() and weight is not None and not weight.any()


def test_orthogonal_inputs_make_up_for_nothing_and_leave_by_their_energy():
    w, x = data(tokens=300)
    x = torch.linalg.qr(x).Q * torch.linspace(1, 3, 20, dtype=DOUBLE)
    energy = x.square().sum(dim=0) * w.square().sum(dim=0)
    for first_order in ("signed", "abs", "off"):
        gone, weight = level(w, x, 7, damping=0.0, first_order=first_order)
        assert gone.nonzero().flatten().tolist() == energy.argsort()[:7].sort().values.tolist()
        torch.testing.assert_close(weight[:, ~gone], w[:, ~gone])


def test_a_group_costs_what_brute_force_says():
    w, x = data()
    problem = Curvature.of(x.T @ x, 0.0).problem(w)
    inverse = torch.linalg.inv(x.T @ x)
    columns = torch.arange(20).reshape(5, 4)
    grown = []
    for group in columns:
        kept = [i for i in range(20) if i not in group.tolist()]
        fitted = torch.linalg.lstsq(x[:, kept], x @ w.T).solution
        grown.append(float((x @ w.T - x[:, kept] @ fitted).square().sum()))
        block = w[:, group] @ torch.linalg.inv(inverse[group][:, group]) @ w[:, group].T
        assert float(block.trace()) == pytest.approx(grown[-1], rel=1e-9)
    gone = in_rounds(problem, columns, 1, rounds=1)
    assert int(gone.nonzero()) == int(torch.tensor(grown).argmin())


@pytest.mark.parametrize("first_order", ["off", "signed"])
def test_of_two_equal_channels_one_takes_over_the_weight_of_the_other(first_order):
    w, x = data()
    x[:, 1] = x[:, 0]
    # small: what they do can't be worth more than what any other one does
    w[:, :2] *= 1e-3
    gone, weight = level(w, x, 1, damping=1e-12, first_order=first_order)
    left = 1 - int(gone.nonzero())
    assert left in (0, 1)
    torch.testing.assert_close(weight[:, left], w[:, 0] + w[:, 1], rtol=1e-4, atol=1e-9)
    assert float((x @ (w - weight).T).norm()) < 1e-6 * float((x @ w.T).norm())


def test_units_that_must_leave_in_equal_numbers_do():
    w, x = data(inputs=24)
    w[:, :12] *= 0.01
    alone, _ = level(w, x, 4, kind="head", width=2)
    assert alone[:6].sum() == 4
    balanced, _ = level(w, x, 4, kind="head", width=2, balance=2)
    assert balanced[:6].sum() == balanced[6:].sum() == 2


def test_without_a_refit_the_same_units_leave_and_nothing_else_changes():
    w, x = data()
    (gone, weight), (same, none) = level(w, x, 8), level(w, x, 8, refit=False)
    assert torch.equal(gone, same) and none is None and weight is not None


def test_singular_inputs_raise_the_damping_and_say_so():
    w, x = data(tokens=9)
    method = make_method("tyr", {"damping": 0.0})
    _, notes = method.levels_of(target(w), seen_of(x), [4], 1)
    assert len(notes) == 1 and "m: damping raised to" in notes[0]


# -- levels and search -------------------------------------------------------------------------------------------------


def group(name, layer, units, kind="neuron", params=10, balance=1):
    return Group(name, kind, layer, units, Cost(params, params, 4 * params), reader=name, balance=balance)


def groups_of(layers=6, heads=3, neurons=64):
    return [
        one
        for layer in range(layers)
        for one in (group(f"{layer}.a", layer, heads, "kv_head", 100), group(f"{layer}.m", layer, neurons))
    ]


@pytest.mark.parametrize("sparsity", [0.1, 0.25, 0.5, 0.6])
def test_layers_start_alike_and_meet_the_budget(sparsity):
    groups, limits = groups_of(), Limits()
    total = sum(g.cost.params * g.units for g in groups)
    start = even_start(groups, sparsity, total, limits)
    heads, neurons = start[::2], start[1::2]
    assert max(heads) - min(heads) <= 1 and max(neurons) - min(neurons) <= 1
    assert sum(heads) == pytest.approx(sparsity * 18, abs=0.5)
    assert sum(100 * h for h in heads) + sum(10 * n for n in neurons) == pytest.approx(sparsity * total, abs=5)


def test_what_one_kind_lacks_the_other_makes_up_for():
    # a single key-value head can't leave
    groups = [group("a", 0, 1, "kv_head", 100), group("m", 0, 64)]
    assert even_start(groups, 0.5, 740, Limits()) == (0, 37)
    # and where neurons are few, the nearest that can be had
    groups = [group("a", 0, 8, "kv_head", 100), group("m", 0, 10)]
    assert even_start(groups, 0.42, 900, Limits(min_keep=4)) == (3, 6)
    assert even_start(groups, 0.46, 900, Limits(min_keep=4)) == (4, 1)
    with pytest.raises(BudgetError, match=r"can't remove 90.0% of the params: with at least 4 unit\(s\)"):
        even_start(groups, 0.9, 900, Limits(min_keep=4))


@pytest.mark.parametrize("sparsity", [0.1, 0.15, 0.2, 0.3, 0.5, 0.55])
@pytest.mark.parametrize("heads", [0, 4])
def test_a_first_rung_that_is_no_whole_bundle_costs_what_it_removes(sparsity, heads):
    groups, limits = groups_of(heads=heads, neurons=72), Limits(round_to=32)
    groups = [g for g in groups if g.units]
    total = sum(g.cost.params * g.units for g in groups)
    start = even_start(groups, sparsity, total, limits)
    lost = sum(g.cost.params * rungs_of(g, limits)[rung] for g, rung in zip(groups, start, strict=True))
    assert lost == pytest.approx(sparsity * total, abs=32 * 10 / 2)


def test_a_remainder_that_is_all_that_can_leave_is_refused_for_more():
    groups, limits = [group(f"{layer}.m", layer, 40) for layer in range(6)], Limits(round_to=32, min_keep=2)
    assert even_start(groups, 0.2, 2400, limits) == (1,) * 6
    with pytest.raises(BudgetError, match=r"can't remove 40\.0% of the params: .* at most 20\.0% can go"):
        even_start(groups, 0.4, 2400, limits)


def test_rungs_are_bundles_of_units():
    limits = Limits(min_keep=2, round_to=8)
    assert rungs_of(group("m", 0, 40), limits) == (0, 8, 16, 24, 32)
    assert rungs_of(group("m", 0, 42), limits) == (0, 2, 10, 18, 26, 34)
    assert rungs_of(group("a", 0, 12, "head", balance=3), Limits()) == (0, 3, 6, 9)


def test_steps_are_an_eighth_halve_and_end_at_one_head_and_32_neurons():
    groups = [group("a", 0, 32, "kv_head"), group("m", 0, 1536)]
    steps = [Grid.of(groups, (0, 0), Limits(), step=0.125 / 2**i, half=4).steps for i in range(5)]
    assert steps == [(4, 192), (2, 96), (1, 48), (1, 32), (1, 32)]
    # of narrow layers an eighth
    assert Grid.of([group("m", 0, 40)], (0,), Limits(), step=0.01, half=4).steps == (5,)


def test_levels_that_would_leave_the_range_are_left_out():
    groups = [group("0", 0, 64), group("1", 1, 64), group("2", 2, 64)]
    grid = Grid.of(groups, (20, 0, 63), Limits(), step=0.125, half=4)
    assert grid.steps == (8, 8, 8)
    assert [(r.start, r.stop - 1) for r in grid.ranges()] == [(-2, 4), (0, 4), (-4, 0)]
    for i, levels in enumerate(grid.ranges()):
        assert all(0 <= grid.removed(i, one) <= 63 for one in levels)
    assert grid.at((-2, 3, -1)).centre == (4, 24, 55)


def test_shifts_are_one_to_four_with_7_5_3_and_1_sixteenths():
    class Counting(Random):
        drawn = 0

        def choice(self, seq):
            self.drawn += 1
            return super().choice(seq)

    random, counts = Counting(0), Counter()
    for _ in range(16_000):
        random.drawn = 0
        shifted((0,) * 6, [range(-9, 10)] * 6, random, most=4)
        counts[random.drawn // 2] += 1
    assert [counts[n] / 1000 for n in (1, 2, 3, 4)] == pytest.approx([7, 5, 3, 1], abs=0.2)


@given(st.integers(0, 10_000))
def test_every_kind_keeps_what_it_loses(seed):
    random = Random(seed)
    kinds = [random.choice(("heads", "neurons")) for _ in range(9)]
    ranges = [range(-random.randint(0, 3), random.randint(0, 3) + 1) for _ in kinds]
    levels = (0,) * 9
    for _ in range(30):
        levels = shifted(levels, ranges, random, most=4, kinds=kinds)
        for kind in set(kinds):
            assert sum(one for one, mine in zip(levels, kinds, strict=True) if mine == kind) == 0
        assert all(one in mine for one, mine in zip(levels, ranges, strict=True))


@given(st.integers(0, 10_000))
def test_rungs_of_unequal_size_keep_what_is_lost_too(seed):
    random, limits = Random(seed), Limits(round_to=32)
    groups = [group(f"{layer}.m", layer, random.choice((72, 64, 100, 160))) for layer in range(7)]
    centre = tuple(random.randrange(len(rungs_of(g, limits))) for g in groups)
    grid = Grid.of(groups, centre, limits, step=0.125, half=2)
    levels = start = (0,) * 7
    for _ in range(20):
        levels = shifted(levels, grid.ranges(), random, most=4, size=grid.removed)
        assert sum(map(grid.removed, range(7), levels)) == sum(map(grid.removed, range(7), start))


def test_a_search_keeps_the_budget_where_neurons_do_not_fill_their_multiples(monkeypatch):
    """40 neurons in multiples of 16: the first to leave are 8."""
    model, options = make_tiny("llama", num_hidden_layers=4), {"sparsity": 0.12, "round_to": 16, "parts": "mlp"}
    start = plan_for("tyr", model, IDS, **options, generations=0)

    def wander(self, levels, ranges, trials, kinds=(), size=None):
        random = Random(0)
        for _ in range(25):
            levels = shifted(levels, ranges, random, most=4, kinds=kinds, size=size)
        return levels

    monkeypatch.setattr(Evolution, "run", wander)
    plan = plan_for("tyr", model, IDS, **QUICK, **options)
    gone = [[len(one.removed(name)) for name in one.keep] for one in (start, plan)]
    assert sum(gone[0]) == sum(gone[1]) and {*gone[0], *gone[1]} <= {0, 8, 24} and 8 in gone[0], gone


class Rugged:
    """A fitness that is another one for every batch, and always the same for the same one."""

    def __init__(self):
        self.parents, self.stages = [], Counter()

    def losses(self, candidates, tokens, seed):
        self.stages[tokens] += len(candidates)
        self.seeds = {*getattr(self, "seeds", ()), seed}
        return [Random(hash((levels, seed))).random() for levels in candidates]

    def done(self):
        return list(self.parents)

    def finish(self, generation, parent):
        self.parents.append(parent)


def test_on_one_batch_a_parent_is_never_worse_than_the_one_before():
    evolution = Evolution(
        generations=12, offspring=6, tokens=(8, 16, 64), survivors=(4, 2), shifts=4, tries=10, fixed="all", seed=3
    )
    trials = Rugged()
    evolution.run((0,) * 8, [range(-2, 3)] * 8, trials, ["a", "b"] * 4)
    fitness = trials.losses([(0,) * 8, *trials.parents], 64, 3)
    assert fitness == sorted(fitness, reverse=True) and fitness[-1] < fitness[0]


def test_survivors_are_measured_on_more_and_the_parent_joins_in_the_end():
    evolution = Evolution(generations=5, offspring=6, tokens=(8, 16, 64), survivors=(4, 2), shifts=4, tries=10)
    trials = Rugged()
    evolution.run((0,) * 8, [range(-2, 3)] * 8, trials)
    assert trials.stages == {8: 30, 16: 20, 64: 15}
    assert evolution.trial_tokens == 30 * 8 + 20 * 16 + 15 * 64
    # minibatches are drawn at every stage
    assert len(trials.seeds) == 15


# -- fitness -----------------------------------------------------------------------------------------------------------


def logits(seed, positions=7, vocabulary=30):
    return 2 * torch.randn(positions, vocabulary, generator=torch.Generator().manual_seed(seed))


def test_sparse_kl_by_its_definition():
    dense, other, ids = logits(0), logits(1), torch.zeros(7, dtype=torch.int64)

    def value(fitness, first, second):
        return fitness.of(fitness.remember(lambda: first), second, ids)

    top = SparseKL(5)
    assert value(top, dense, dense) == pytest.approx(0, abs=1e-6)
    assert value(top, dense, other + 3) == pytest.approx(value(top, dense, other), rel=1e-5)
    values, places = dense.topk(5, dim=-1)
    wanted = F.kl_div(
        other.gather(-1, places).log_softmax(-1), values.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    assert value(top, dense, other) == pytest.approx(float(wanted), rel=1e-5)
    # not over the whole vocabulary, unless that is asked for
    full = value(FullKL(), dense, other)
    assert value(SparseKL(30), dense, other) == pytest.approx(full, rel=1e-5)
    assert value(SparseKL(1000), dense, other) == pytest.approx(full, rel=1e-5)
    assert abs(value(top, dense, other) - full) > 0.01


def test_perplexity_is_that_of_the_tokens_that_follow():
    other, ids = logits(1), torch.arange(7)
    fitness = CrossEntropy()
    assert fitness.remember(pytest.fail) is None
    assert fitness.of(None, other, ids) == pytest.approx(-float(other.log_softmax(-1)[ids, ids].mean()))


def test_the_mean_of_levels_goes_by_what_they_keep():
    assert expectation_weights([0, 0.5, 1]) == pytest.approx([2 / 3, 1 / 3, 0])


# -- the whole ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def watched(monkeypatch):
    """What levels were made of, by name of the group and in order, and the weights that were handed on."""
    levels, handed = [], []
    real, put = Tyr.levels_of, secateur.engine.supernet.set_weight

    def levels_of(self, target, seen, removed, balance):
        found = real(self, target, seen, removed, balance)
        levels.append((target, list(removed), found[0]))
        return found

    def set_weight(block, name, weight, transposed):
        handed.append(weight)
        put(block, name, weight, transposed)

    monkeypatch.setattr(Tyr, "levels_of", levels_of)
    monkeypatch.setattr(secateur.engine.supernet, "set_weight", set_weight)
    return levels, handed


@pytest.mark.parametrize("accumulation", ["expectation", "centre", "none"])
def test_all_levels_come_from_the_dense_weights_and_are_handed_on(accumulation, watched):
    model, (levels, handed) = make_tiny("llama"), watched
    plan_for("tyr", model, IDS, sparsity=0.4, accumulation=accumulation, **QUICK)
    # two groups of three blocks, twice
    assert len(levels) == 12 and len(handed) == (0 if accumulation == "none" else 12)
    assert max(len(removed) for _, removed, _ in levels) > 2
    dense = {g.name: model.get_parameter(f"{g.reader}.weight").detach() for g in decoder_anatomy(model) if g.reader}
    for target, _, _ in levels:
        assert torch.equal(target.weight, dense[target.name])
    for (target, removed, found), weight in zip(levels, handed, strict=False):
        columns = [torch.isin(torch.arange(target.weight.shape[1]), target.columns[gone]) for gone, _ in found]
        made = [target.weight * ~c if w is None else w for c, (_, w) in zip(columns, found, strict=True)]
        kept = torch.tensor([1 - count / target.units for count in removed])
        mean = sum(k * w for k, w in zip(kept / kept.sum(), made, strict=True))
        if accumulation == "expectation":
            torch.testing.assert_close(weight, mean)
        else:
            assert any(torch.equal(weight, one) for one in made)


def test_with_one_level_the_mean_is_the_middle(watched):
    model = make_tiny("llama")
    first, second = (
        plan_for("tyr", model, IDS, sparsity=0.4, levels=1, generations=0, accumulation=a)
        for a in ("expectation", "centre")
    )
    assert first.values.keys() == second.values.keys() and not first.diff(second)
    assert all(torch.equal(first.values[n], second.values[n]) for n in first.values)


def counted(plan, model):
    """What each kind loses in all."""
    totals = Counter()
    for one in decoder_anatomy(model).of_kind("kv_head", "neuron"):
        totals[one.kind] += len(plan.removed(one.name)) if one.name in plan.keep else 0
    return +totals


def test_a_search_moves_sparsity_within_a_kind_and_lowers_what_it_looks_at():
    model = make_tiny("llama", num_hidden_layers=4, intermediate_size=64)
    how = {"sparsity": 0.4, "stage_tokens": "128", "survivors": "", "fixed": "all", "fitness": "kl"}
    alike = plan_for("tyr", model, IDS, generations=0, **how)
    found = plan_for("tyr", model, IDS, generations=8, iterations=1, offspring=6, **how)
    assert counted(alike, model) == counted(found, model)
    assert {n: len(k) for n, k in alike.keep.items()} != {n: len(k) for n, k in found.keep.items()}

    def divergence(plan):
        with torch.no_grad():
            dense, cut = (one(IDS).logits[:, :-1].log_softmax(-1) for one in (model, sc.apply(plan, model)))
        return float((dense.exp() * (dense - cut)).sum(-1).mean())

    assert divergence(found) < divergence(alike)


@pytest.mark.parametrize(
    ("family", "refit"), [*((family, True) for family in (*LAYOUTS, "granite")), ("llama", False), ("gpt2", False)]
)
def test_candidates_are_the_model_with_their_levels(family, refit, monkeypatch):
    """Heads that are zeros and neurons that are cut out, all at once, beside each candidate put together by hand."""
    model, ids = make_tiny(family), IDS[:4]
    found = []

    def watched(self, candidates, tokens, seed):
        losses = measure(self, candidates, tokens, seed)
        assert {g.kind for g in self._cut.values()} == {"neuron"}
        for levels, loss in zip(candidates, losses, strict=True):
            other = copy.deepcopy(model)
            for matrix, level in zip(self._matrices, levels, strict=True):
                weight = other.get_submodule(matrix.module).weight.data
                stored = weight.T if matrix.transposed else weight
                stored.copy_(level_weight(self._keeper, matrix.module, level, stored)[1])
            with torch.no_grad():
                dense, cut = (one(ids).logits[:, :-1].log_softmax(-1) for one in (model, other))
            found.append((loss, float((dense.exp() * (dense - cut)).sum(-1).mean())))
        return losses

    measure = LevelTrials.losses
    monkeypatch.setattr(LevelTrials, "losses", watched)
    how = {"generations": 2, "offspring": 4, "iterations": 1, "stage_tokens": "64", "survivors": "", "fitness": "kl"}
    plan_for("tyr", model, ids, sparsity=0.4, refit=refit, **how)
    assert len(found) == 10 and len({by_hand for _, by_hand in found}) > 4
    for loss, by_hand in found:
        assert loss == pytest.approx(by_hand, rel=1e-4)


def test_neurons_alone_give_the_whole_budget():
    model = make_tiny("llama", num_hidden_layers=4, intermediate_size=64)
    both, mlp = (plan_for("tyr", model, IDS, sparsity=0.3, parts=parts, **QUICK) for parts in ("both", "mlp"))
    assert counted(both, model)["kv_head"] and set(counted(mlp, model)) == {"neuron"}
    removed = [removed_fraction(plan, sc.anatomy(model)) for plan in (both, mlp)]
    assert removed == pytest.approx([0.3, 0.3], abs=0.01)
    with pytest.raises(BudgetError, match=r"can't remove 90.0% of the params"):
        plan_for("tyr", model, IDS, sparsity=0.9, parts="mlp", **QUICK)


def test_kept_weights_of_a_plan_are_the_refit():
    """Nothing between the solver and the cut model: the reader's outputs are least squares on what is left."""
    model = make_tiny("llama").double()
    plan = plan_for(
        "tyr", model, IDS, dtype=DOUBLE, sparsity=0.4, generations=0, levels=1, accumulation="none", damping=1e-9
    )
    name = "model.layers.1.mlp.down_proj"
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        model(IDS)
    handle.remove()
    kept, dense = plan.keep["layers.1.mlp"], model.get_submodule(name).weight.detach()
    wanted = torch.linalg.lstsq(seen[0][:, kept], seen[0] @ dense.T).solution.T
    cut = sc.apply(plan, model).get_submodule(name).weight.detach()
    torch.testing.assert_close(cut, wanted, rtol=1e-5, atol=1e-6)


def test_the_cut_model_is_narrower_and_loads_elsewhere(tmp_path):
    from transformers import AutoModelForCausalLM

    model = make_tiny("llama")
    plan = plan_for("tyr", model, IDS, sparsity=0.4, **QUICK)
    cut = sc.apply(plan, model)
    for block, dense in zip(cut.model.layers, model.model.layers, strict=True):
        assert block.mlp.down_proj.in_features <= dense.mlp.down_proj.in_features
    assert sum(p.numel() for p in cut.parameters()) < sum(p.numel() for p in model.parameters())
    folder = sc.save(cut, None, tmp_path / "cut", plan=plan)
    stock = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=not plain(cut)).eval()
    with torch.no_grad():
        torch.testing.assert_close(stock(IDS).logits, cut(IDS).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"survivors": "4,2"}, "survivors must hold one number for every stage but the last, got '4,2' for 2 stages"),
        ({"stage_tokens": "512,x"}, "stage_tokens must be whole numbers of at least 2 with commas, got '512,x'"),
        ({"stage_tokens": "1,2"}, "stage_tokens must be whole numbers of at least 2"),
        ({"levels": 4}, "levels must be odd, with as many on either side, got 4"),
        ({"survivors": "0"}, "survivors must be whole numbers of at least 1"),
        ({"budget": "latency"}, "budget must be one of params, macs, bytes"),
        ({"fitness": "hidden"}, "fitness must be one of sparse_kl, kl, ppl"),
    ],
)
def test_bad_options_are_refused_in_one_sentence(options, message):
    with pytest.raises(OptionError) as caught:
        make_method("tyr", options)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_stage_can_not_be_longer_than_the_calibration_text(watched):
    how = {"sparsity": 0.4, "stage_tokens": "64,129", "survivors": "2"}
    with pytest.raises(DataError, match="measures candidates on 129 tokens, and the calibration text has 128: give"):
        plan_for("tyr", make_tiny("llama"), IDS, **how)
    assert not watched[0]
    # without a search, nothing is measured
    plan_for("tyr", make_tiny("llama"), IDS, generations=0, **how)


def test_what_it_can_not_cut_is_refused_before_anything_is_looked_at(watched, make_llama):
    from runs import tokens_of
    from secateur.engine import decide
    from secateur.models.sources import Source

    with pytest.raises(BudgetError, match=r"can't remove 95\.0% of the params"):
        plan_for("tyr", make_tiny("llama"), IDS, sparsity=0.95, min_keep=2)
    several = type("Several", (Ranks,), {"size": 2})()
    how = {"dtype": torch.float32, "batch_tokens": 32, "progress": lambda *_: None}
    with pytest.raises(UsageError, match="tyr searches on the whole model, in one process"):
        decide(make_method("tyr"), Source(make_llama()), tokens_of(IDS), ranks=several, **how)
    unknown = make_llama()
    unknown.config.model_type = "nobody"
    with pytest.raises(UnsupportedModelError, match="'nobody' are unknown"):
        plan_for("tyr", unknown, IDS)
    assert not watched[0]
