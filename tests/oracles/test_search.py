"""The level search: shifts by hand, a planted optimum, and the trials against a second computation."""

import math
from collections import Counter
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import secateur as sc
from secateur.allocators import Part
from secateur.allocators.search import Search
from secateur.engine.keeping import Decision, Keeper
from secateur.engine.searching import LevelTrials, level_tensors
from secateur.errors import UsageError
from secateur.methods import Target, make_method
from secateur.models.sources import Source
from secateur.observe import Gram
from secateur.observe.calibration import load_tokens
from secateur.search import shifted

PARTS = [Part(f"{layer}.{role}", layer, role, shape) for layer in range(4)
         for role, shape in (("q", (64, 64)), ("k", (16, 64)), ("down", (64, 160)))]  # fmt: skip


class Counting(Random):
    """Counts how many parts are drawn."""

    drawn = 0

    def choice(self, seq):
        self.drawn += 1
        return super().choice(seq)


def test_one_two_or_three_shifts_with_5_3_and_1_ninths():
    random, counts = Counting(0), Counter()
    for _ in range(9000):
        random.drawn = 0
        shifted((0,) * 6, [range(-9, 10)] * 6, random)
        counts[random.drawn // 2] += 1
    assert [counts[n] / 1000 for n in (1, 2, 3)] == pytest.approx([5, 3, 1], abs=0.15)


@given(st.integers(0, 10_000), st.integers(1, 60))
def test_levels_sum_to_zero_and_stay_within(seed, generations):
    random = Random(seed)
    ranges = [range(-random.randint(0, 2), random.randint(0, 2) + 1) for _ in range(5)]
    levels = (0,) * 5
    for _ in range(generations):
        levels = shifted(levels, ranges, random)
        assert all(level in one for level, one in zip(levels, ranges, strict=True))
        assert sum(levels) == 0


@given(st.floats(0.1, 0.9), st.integers(0, 1000))
def test_the_number_of_weights_that_stay_is_constant(sparsity, seed):
    search, random = Search(), Random(seed)
    ranges = search.ranges(PARTS, sparsity)
    levels = (0,) * len(PARTS)
    for _ in range(20):
        levels = shifted(levels, ranges, random)
    sizes = np.array([part.size for part in PARTS])
    found = search.at(PARTS, levels, sparsity)
    assert (found * sizes).sum() == pytest.approx(sparsity * sizes.sum())
    assert found.min() >= 0 and (found * sizes <= sizes - 1).all()


class Planted:
    """Trials whose best levels are known."""

    def __init__(self, wanted, done=()):
        self.wanted, self.parents, self.calls = wanted, list(done), 0

    def losses(self, candidates, tokens, seed):
        self.calls += len(candidates)
        return [float(sum((a - b) ** 2 for a, b in zip(one, self.wanted, strict=True))) for one in candidates]

    def done(self):
        return list(self.parents)

    def finish(self, generation, parent):
        assert generation == len(self.parents)
        self.parents.append(parent)


WANTED = (-2, 1, 0, -1, 1, 0, 0, 1, 0, 1, -1, 0)


def test_a_planted_optimum_is_found():
    trials = Planted(WANTED)
    assert Search(generations=200).run(PARTS, 0.7, trials) == WANTED
    fitness = trials.losses(trials.parents, 0, 0)
    assert fitness == sorted(fitness, reverse=True)


@pytest.mark.parametrize("done", [1, 7, 12])
def test_a_search_that_goes_on_ends_the_same(done):
    whole = Planted(WANTED)
    Search().run(PARTS, 0.7, whole)
    again = Planted(WANTED, whole.parents[:done])
    Search().run(PARTS, 0.7, again)
    assert again.parents == whole.parents
    assert again.calls < whole.calls and (again.calls == 0) == (done == 12)


def test_another_seed_searches_elsewhere():
    first, second = Planted(WANTED), Planted(WANTED)
    Search(seed=0).run(PARTS, 0.7, first)
    Search(seed=1).run(PARTS, 0.7, second)
    assert first.parents != second.parents


@pytest.mark.parametrize("method", ["magnitude", "sparsegpt"])
def test_a_trial_is_the_divergence_of_the_pruned_model(method, make_llama, monkeypatch):
    """By hand: prune the matrices at other levels, put them into the model, and compare all predictions."""
    model = make_llama()
    ids = torch.randint(2, 512, (3, 24), generator=torch.Generator().manual_seed(0))
    matrices = sc.anatomy(model).matrices
    keeper, made = Keeper(), {}
    for matrix in matrices:
        gram = Gram()
        x = torch.randn(2, 70, matrix.shape[1], generator=torch.Generator().manual_seed(1))
        gram.update(x)
        target = Target(matrix.module, "weight", matrix.layer, model.get_submodule(matrix.module).weight.detach())
        for level, sparsity in ((0, 0.3), (1, 0.6)):
            made.setdefault(matrix.module, {})[level] = make_method(method, {"sparsity": sparsity}).prune(
                target, {"gram": gram}
            )[:2]
        keeper.keep(0, Decision(), final=False, ranked=level_tensors(matrix.module, made[matrix.module]))
    trials = LevelTrials(
        Source(model),
        matrices,
        ids,
        keeper,
        dtype=torch.float32,
        generations=1,
        progress=lambda *_: None,
    )
    dense = log_softmax(model, ids)
    candidates = [(0,) * 14, (1, 0) * 7, (0, 1, 1) * 4 + (0, 0), (0,) * 13 + (1,)]
    found = trials.losses(candidates, 3 * 24, 0)
    for levels, divergence in zip(candidates, found, strict=True):
        cut = make_llama()
        with torch.no_grad():
            for matrix, level in zip(matrices, levels, strict=True):
                keep, weight = made[matrix.module][level]
                parameter = cut.get_submodule(matrix.module).weight
                parameter.copy_(parameter * keep if weight is None else weight * keep)
        # nothing follows the last position of a window
        expected = (dense.exp() * (dense - log_softmax(cut, ids)))[:, :-1].sum(dim=-1).mean()
        # of models that are nearly alike, in float32
        assert divergence == pytest.approx(float(expected), rel=5e-3)
        assert trials.losses([levels], 3 * 24, 0) == [divergence]
    # what was remembered of the dense model is forgotten where it would be too much, and computed again
    monkeypatch.setattr("secateur.engine.searching._REMEMBERED_BYTES", 0)
    frugal = LevelTrials(
        Source(model), matrices, ids, keeper, dtype=torch.float32, generations=1, progress=lambda *_: None
    )
    for tokens, seed in ((72, 0), (30, 1), (30, 2), (72, 0)):
        assert frugal.losses([levels], tokens, seed) == trials.losses([levels], tokens, seed)
        assert len(frugal._remembered) <= 3
    # 30 tokens are a window of 24 and 6 of another one
    assert [length for _, length in trials._windows(30, 1)] == [24, 6]
    # some of the windows, and some of their tokens
    assert trials.losses([levels], 8, 0) != trials.losses([levels], 8, 1)


def test_a_model_that_gives_nan_is_no_candidate(make_llama):
    model, ids, keeper = make_llama(), torch.arange(2, 26)[None], Keeper()
    matrices = [m for m in sc.anatomy(model).matrices if m.module.endswith("down_proj")]
    keep = torch.ones(matrices[0].shape, dtype=torch.bool)
    for matrix in matrices:
        made = {0: (keep, None), 1: (keep, torch.full(matrix.shape, math.inf))}
        keeper.keep(0, Decision(), final=False, ranked=level_tensors(matrix.module, made))
    trials = LevelTrials(
        Source(model), matrices, ids, keeper, dtype=torch.float32, generations=1, progress=lambda *_: None
    )
    assert trials.losses([(1, 0), (0, 0), (0, 1)], 24, 0) == [math.inf, 0.0, math.inf]


@torch.no_grad()
def log_softmax(model, ids):
    return model(input_ids=ids).logits.double().log_softmax(dim=-1)


def test_a_search_never_ends_worse_than_it_began(make_llama, tiny_tokenizer):
    model = make_llama(num_hidden_layers=3)

    def divergence(allocate):
        plan = sc.plan(model, tiny_tokenizer, method="magnitude", sparsity=0.6, allocate=allocate, samples=4, length=64)
        ids = load_tokens("builtin", tiny_tokenizer, samples=4, length=64, seed=0, model=model).ids
        dense, cut = log_softmax(model, ids), log_softmax(sc.apply(plan, model), ids)
        return float((dense.exp() * (dense - cut)).sum(dim=-1).mean())

    assert divergence("search:generations=4,offspring=4,last_tokens=256") < divergence("progression")


def test_patterns_are_not_searched(make_llama, tiny_tokenizer):
    with pytest.raises(UsageError, match="pattern 2:4 fixes them: take owl"):
        sc.plan(make_llama(), tiny_tokenizer, method="magnitude", pattern="2:4", allocate="search", length=32)
