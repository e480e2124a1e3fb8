"""Oracles of iCBS: the quadratic model against every subset, solvers against all answers, and what a search keeps."""

import copy
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from conftest import build_llama
from families import make_tiny, tiny_ids
from runs import plan_for
from secateur.errors import DataError, NonFiniteError, OptionError, UnsupportedModelError, UsageError
from secateur.methods import Target, make_method
from secateur.search import (
    Descent,
    MaskDescent,
    Searched,
    class_loss,
    cut_off,
    mean_gradients,
    quadratic,
    step_slots,
    token_loss,
)
from secateur.search.descent import batches
from secateur.search.quadratic import FactoredQuadratic, Quadratic, outer_quadratic
from secateur.search.told import exact_hessian, listen
from secateur.solver.binary import (
    Annealing,
    Exhaustive,
    Factored,
    SwapSearch,
    add_solver,
    energy,
    ising,
    minimise,
    penalty,
    start_with_fewer,
)


def problem(n, seed=0):
    """(w0, w, g, H) of n weights, half of them pruned; H symmetric, not definite."""
    generator = torch.Generator().manual_seed(seed)
    w0, g = torch.randn(2, n, generator=generator, dtype=torch.float64)
    H = torch.randn(n, n, generator=generator, dtype=torch.float64)
    return w0, w0 * (torch.arange(n) >= n // 2), g, H + H.T


def subsets(n, k):
    return [torch.tensor([i in ones for i in range(n)]) for ones in map(set, combinations(range(n), k))]


# -- the quadratic model (oracles 1 and 2, the cutoff) -----------------------------------------------------------


@pytest.mark.parametrize(("multiplier", "ridge"), [(1.0, 0.0), (0.75, 0.001)])
def test_the_model_is_the_expansion_for_every_subset(multiplier, ridge):
    w0, w, g, H = problem(12)
    model = quadratic(w0, w, g, H, multiplier=multiplier, ridge=ridge)
    everything = subsets(12, 6)
    assert len(everything) == 924
    for x in everything:
        delta = w0 * ~x - w
        expected = multiplier * (g @ delta) + delta @ H @ delta / 2 + ridge * (delta @ delta)
        assert model.change(x) == pytest.approx(float(expected), abs=1e-9)


def test_staying_changes_nothing():
    w0, w, g, H = problem(12)
    assert quadratic(w0, w, g, H).change(w == 0) == pytest.approx(0, abs=1e-12)


def test_the_published_cutoff_loses_what_attracts():
    w0, w, g, H = problem(12)
    Q = quadratic(w0, w, g, H).Q
    scaled = cut_off(Q, "abs")
    torch.testing.assert_close(scaled, Q / Q.abs().mean())
    official = cut_off(Q, "official")
    assert (official >= 0).all() and torch.equal(official, scaled.clamp_min(0))
    model = quadratic(w0, w, g, H)
    best, theirs = (model.change(torch.from_numpy(Exhaustive().solve(q.numpy(), 6))) for q in (scaled, official))
    assert best < theirs


def low_rank(n, samples, seed=0):
    """(the model with Q as a factor, the same with Q as a whole)."""
    w0, w, g, _ = problem(n, seed)
    each = torch.randn(samples, n, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    each[:, 5] = g[5] = 0
    H = each.T @ each / samples
    expansion = {"multiplier": 0.75, "ridge": 0.001}
    return outer_quadratic(w0, w, g, each, **expansion), quadratic(w0, w, g, H, **expansion)


def test_a_sum_of_few_squares_is_never_built_and_says_the_same():
    factored, whole = low_rank(200, 4)
    assert isinstance(factored, FactoredQuadratic) and isinstance(low_rank(100, 4)[0], Quadratic)
    assert factored.c == pytest.approx(whole.c) and factored.free.nonzero().flatten().tolist() == [5]
    assert torch.equal(factored.free, whole.free)
    for seed in range(5):
        x = torch.rand(200, generator=torch.Generator().manual_seed(seed)) > 0.5
        assert factored.change(x) == pytest.approx(whole.change(x))
    some = (torch.arange(200) % 3 > 0).nonzero().flatten()
    found = factored.problem(some, "abs")
    assert isinstance(found, Factored)
    np.testing.assert_allclose(found.whole(), whole.Q[some][:, some].numpy(), atol=1e-12)
    scaled, entries = found.scaled(), np.count_nonzero(found.whole())
    np.testing.assert_allclose(scaled.whole(), whole.problem(some, "abs"), atol=1e-9)
    assert scaled.size == pytest.approx(entries) and scaled.size == pytest.approx(np.abs(scaled.whole()).sum())
    # all negative entries vanish with the published cutoff, and what is left is no sum of squares
    np.testing.assert_allclose(factored.problem(some, "official"), whole.problem(some, "official"), atol=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_a_factor_is_solved_by_the_same_exchanges(seed):
    factored, whole = (model.problem(torch.arange(300), "abs") for model in low_rank(300, 8, seed))
    found = minimise(SwapSearch(), factored, 150)
    assert (~found[:150]).sum() > 20 and (found == minimise(SwapSearch(), whole, 150)).all()
    # solvers that know nothing of factors are given the matrix
    assert (minimise(First(), factored, 7) == (np.arange(300) < 7)).all()


class First:
    def solve(self, Q, k):
        assert isinstance(Q, np.ndarray) and np.abs(Q).mean() == pytest.approx(1, rel=0.1)
        return np.arange(len(Q)) < k


# -- solvers (oracles 3 and 4) -----------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", [Exhaustive(), SwapSearch(), Annealing(restarts=4)])
def test_hand_case(solver):
    Q = np.array([[2.0, 1], [1, 1]])
    assert minimise(solver, Q, 1).tolist() == [False, True]
    assert energy(Q, [0, 1]) == 1 and energy(Q, minimise(solver, Q, 2)) == 5
    assert not minimise(solver, Q, 0).any()


@settings(max_examples=25)
@given(st.integers(3, 11), st.integers(0, 10**6), st.data())
def test_solvers_find_the_best_of_all_answers(n, seed, data):
    k = data.draw(st.integers(1, n - 1))
    Q = np.random.default_rng(seed).normal(size=(n, n))
    Q = Q + Q.T
    lowest = energy(Q, minimise(Exhaustive(), Q, k))
    assert energy(Q, minimise(SwapSearch(), Q, k)) == pytest.approx(lowest, abs=1e-9)
    assert energy(Q, minimise(Annealing(restarts=6), Q, k)) == pytest.approx(lowest, abs=1e-9)


def test_a_larger_problem_ends_in_a_point_that_no_exchange_betters():
    Q = np.random.default_rng(0).normal(size=(90, 90))
    Q = Q + Q.T
    x = SwapSearch(shortlist=8).solve(Q, 40)
    lowest = energy(Q, x)
    for on in np.flatnonzero(~x):
        for off in np.flatnonzero(x):
            other = x.copy()
            other[[on, off]] = True, False
            assert energy(Q, other) >= lowest - 1e-9
    assert lowest <= energy(Q, Annealing(restarts=1).solve(Q, 40)) * 0.9


def test_runs_of_annealing_do_not_depend_on_each_other():
    Q = np.random.default_rng(1).normal(size=(16, 16))
    Q = Q + Q.T
    alone = [energy(Q, Annealing(restarts=r).solve(Q, 6)) for r in (1, 2, 5)]
    assert alone[0] >= alone[1] >= alone[2]


def test_penalty_and_ising_forms():
    P, constant = penalty(5, 3)
    for ones, expected in ((3, 0), (2, 1), (4, 1), (1, 4), (5, 4)):
        assert energy(P, np.arange(5) < ones) + constant == expected
    Q = np.random.default_rng(2).normal(size=(5, 5))
    Q = Q + Q.T
    J, h, shift = ising(Q)
    for number in range(32):
        x = np.array([number >> bit & 1 for bit in range(5)])
        s = 2 * x - 1
        assert s @ J @ s + h @ s + shift == pytest.approx(energy(Q, x))


class Fixed:
    def __init__(self, answer):
        self.answer = answer

    def solve(self, Q, k):
        return self.answer


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        ([1, 1, 0], "1 ones among 3 variables, it gave 2"),
        ([1, 0], "shape"),
        ([2, 0, 0], "zeros and ones"),
        ([0.5, 0.5, 0], "zeros"),
    ],
)
def test_an_answer_that_does_not_fit_is_refused(answer, match):
    with pytest.raises(UsageError, match=f"Fixed.solve must give.*{match}"):
        minimise(Fixed(answer), np.eye(3), 1)


def test_solvers_have_names():
    mine = Fixed(None)
    add_solver("fixed-by-a-test", mine)
    assert make_method("icbs", {"solver": "fixed-by-a-test"}).descent().solver is mine
    with pytest.raises(UsageError, match="already"):
        add_solver("swap", mine)
    with pytest.raises(UsageError, match="solve"):
        add_solver("another", object())
    with pytest.raises(OptionError, match="unknown solver 'swop'; did you mean 'swap'"):
        make_method("icbs", {"solver": "swop"})
    with pytest.raises(UsageError, match="never ends"):
        Exhaustive().solve(np.eye(64), 32)


# -- the search (oracles 5 to 8) ---------------------------------------------------------------------------------


def network(seed=0, inputs=12):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(inputs, 24), nn.Tanh(), nn.Linear(24, 4)).eval()


def samples(count=40, inputs=12):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, inputs, generator=generator), torch.randint(0, 4, (count,), generator=generator)


def started(module, density=0.5):
    found = []
    for name in ("0", "2"):
        score = module.get_submodule(name).weight.detach().abs()
        keep = torch.zeros(score.numel(), dtype=torch.bool)
        keep[score.flatten().argsort(descending=True)[: round(score.numel() * density)]] = True
        found.append(Searched(name, keep.reshape(score.shape), score))
    return found


def search(module=None, data=None, **changes):
    module = module or network()
    options = {"block": 16, "steps": 10, "epochs": 10, "batch": 8, "solver": SwapSearch(kicks=0), **changes}
    return MaskDescent(module, started(module), data or samples(), class_loss, Descent(**options))


def test_a_hundred_steps_keep_number_values_fixed_sets_and_the_queue():
    module = network()
    dense = copy.deepcopy(module)
    descent = search(module)
    first, fixed = descent.masks(), {m.name: ~m.free for m in descent._matrices}
    waiting: dict[str, set] = {"0": set(), "2": set()}
    for _ in range(100):
        before = {m.name: m.tabu.clone() for m in descent._matrices}
        [move] = descent.step()
        for matrix in descent._matrices:
            assert matrix.keep.sum() == first[matrix.name].sum()
            assert torch.equal(matrix.keep[fixed[matrix.name]], first[matrix.name].flatten()[fixed[matrix.name]])
            assert len(matrix.tabu) <= matrix.tabu_length
            new = set(matrix.tabu.tolist()) - set(before[matrix.name].tolist())
            if matrix.name == move.layer and matrix.tabu_length:
                assert len(new) == min(16, matrix.tabu_length)
    assert descent.finished and sum(m.exchanged for m in descent.trace) > 100
    assert descent._matrices[0].tabu_length and waiting
    for name, keep in descent.masks().items():
        weight = module.get_submodule(name).weight
        assert torch.equal(weight, dense.get_submodule(name).weight * keep)
        assert 0.4 < float(fixed[name].float().mean()) / 0.385 < 1.1
        assert not torch.equal(keep, first[name])


def test_fixed_sets_and_blocks_go_by_rank():
    descent = search()
    matrix = descent._matrices[0]
    first = matrix.original.abs().flatten()
    gone, kept = (~matrix.keep).nonzero().flatten(), matrix.keep.nonzero().flatten()
    fixed = [*gone[first[gone].argsort()][:60], *kept[first[kept].argsort()][-50:]]
    # 42 % and 35 % of 144 each
    assert set(map(int, fixed)) == set((~matrix.free).nonzero().flatten().tolist())
    told = SimpleNamespace()
    gradient = torch.randn(288, generator=torch.Generator().manual_seed(2))
    score = descent._scores(matrix, told, gradient, 0)
    torch.testing.assert_close(score, (matrix.original.flatten() * gradient).abs())
    block, pruned = descent._block(matrix, score)
    free, taken = (~matrix.keep & matrix.free, matrix.keep & matrix.free), (block[:8], block[8:])
    assert pruned == 8 and all(bool(one[part].all()) for one, part in zip(free, taken, strict=True))
    assert score[taken[0]].min() == score[free[0]].sort().values[-8]
    assert score[taken[1]].max() == score[free[1]].sort().values[7]


@pytest.mark.parametrize("kind", ["gradient_per_sample", "gradient_mean"])
@pytest.mark.parametrize("count", [3, 80])
def test_curvature_of_a_batch_is_the_mean_over_its_samples(kind, count):
    descent = search(hessian=kind)
    matrix, index = descent._matrices[0], torch.arange(2 * count)[::2]
    each_Sn = torch.randn(2, count, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    told = SimpleNamespace(samples=2, per_sample=lambda rows, columns: each_Sn)
    found = descent._model(matrix, told, each_Sn.mean(dim=0), index, samples(8))
    H = sum(torch.outer(g, g) for g in each_Sn) / 2
    if kind == "gradient_mean":
        H = torch.outer(each_Sn.mean(dim=0), each_Sn.mean(dim=0)) / 2
    weights = matrix.original.flatten()[index], matrix.weight_OI.flatten()[index], each_Sn.mean(dim=0)
    expected = quadratic(*weights, H, multiplier=0.75, ridge=0.001)
    for seed in range(5):
        x = torch.rand(count, generator=torch.Generator().manual_seed(seed)) > 0.5
        assert found.change(x) == pytest.approx(expected.change(x), rel=1e-9)


def test_the_loss_falls_and_is_predicted():
    descent = search(checks=100, gradient_multiplier=1.0, ridge=0.0, hessian="exact", block=8, batch=40)
    descent.run()
    measured, predicted = (
        torch.tensor([getattr(m, kind) for m in descent.trace]) for kind in ("measured", "predicted")
    )
    assert descent.trace[-1].before < 0.95 * descent.trace[0].before
    assert (predicted <= 1e-9).all()
    assert torch.corrcoef(torch.stack([measured, predicted]))[0, 1] > 0.9
    assert len(descent.notes()) == 101 and "weights exchanged in 100 steps" in descent.notes()[-1]


def test_matrices_of_one_batch_are_stepped_from_the_same_gradients():
    """Each as if it were the first; one after the other the second sees what the first has become."""
    pair, first = {"batch": 40, "steps": 2, "epochs": 1, "checks": 1}, {}
    for seed in range(4):
        descent = search(**pair, seed=seed)
        [move] = descent.step()
        first[move.layer] = descent.masks()[move.layer]
    together, in_turn = search(**pair, together=2), search(**pair)
    moves = together.step()
    assert together.finished and {move.layer for move in moves} == {"0", "2"}
    assert all(torch.equal(mask, first[name]) for name, mask in together.masks().items())
    assert not all(torch.equal(mask, first[name]) for name, mask in in_turn.run().items())
    # what was measured is the change by both
    told, predicted = together.notes()[0], sum(move.predicted for move in moves)
    assert told.startswith("steps 1 to 2: loss") and f"predicted {predicted:+.1e}, measured" in told
    with pytest.raises(OptionError, match="hessian=exact is taken at one matrix at a time"):
        make_method("icbs", {"hessian": "exact", "together": 2})


def test_a_matrix_stands_once_in_a_batch():
    """One that comes again waits for the next batch: stepped twice from one gradient it would be taken back."""
    assert list(batches([0, 1, 1, 0, 1, 2], 1)) == [[0], [1], [1], [0], [1], [2]]
    assert list(batches([0, 1, 1, 0, 1, 2], 2)) == [[0, 1], [1, 0], [1, 2]]
    assert list(batches([0, 0, 0, 1, 2, 0], 3)) == [[0, 1, 2], [0], [0], [0]]
    descent = search(together=2, steps=6, epochs=2, checks=20)
    assert {descent._matrices[i].name for i in descent._slots} == {"0", "2"}
    seen = []
    while not descent.finished:
        moves = descent.step()
        assert len({move.layer for move in moves}) == len(moves)
        seen.append(moves)
    assert [m.step for m in descent.trace] == list(range(1, 13)) and max(map(len, seen)) == 2
    # the notes count a batch from where it began
    sums = [sum(m.predicted for m in moves) for moves in seen]
    assert all(f"predicted {sums[i]:+.1e}, measured" in note for i, note in enumerate(descent.notes()[:-1]))
    later = search(together=2, steps=6, epochs=2, checks=20)
    later.load_state(descent.state() | {"trace": descent.state()["trace"][: len(seen[0])]})
    assert later.step()[0].step == len(seen[0]) + 1


def test_one_step_on_a_quadratic_loss_is_the_best_of_all_masks():
    generator = torch.Generator().manual_seed(3)
    module = nn.Sequential(nn.Linear(10, 1, bias=False)).double().eval()
    x, y = torch.randn(30, 10, generator=generator).double(), torch.randn(30, 1, generator=generator).double()
    with torch.no_grad():
        module[0].weight.copy_(torch.randn(1, 10, generator=generator))
    original = module[0].weight.detach().clone()

    def squares(module, batch):
        return (module(batch[0]) - batch[1]).square().sum(dim=1)

    score = torch.rand(1, 10, generator=generator)
    keep = score > score.median()
    options = {"block": 10, "batch": 30, "fix_pruned": 0.0, "fix_kept": 0.0, "gradient_multiplier": 1.0, "ridge": 0.0}
    settings = Descent(**options, hessian="exact", checks=1, solver=Exhaustive())
    descent = MaskDescent(module, [Searched("0", keep, score)], (x, y), squares, settings)
    [move] = descent.step()
    assert move.measured == pytest.approx(move.predicted, abs=1e-9)
    losses = [float((x @ (original * ~gone).T - y).square().mean()) for gone in subsets(10, 5)]
    assert move.before + move.measured == pytest.approx(min(losses), abs=1e-9)


def test_steps_go_by_the_logarithm_of_the_size():
    assert [step_slots([10**2, 10**4], 6, 0).count(i) for i in (0, 1)] == [2, 4]
    assert step_slots([10, 10**6, 10], 0, 1) == [0, 1, 2]
    many = step_slots([10, 10**6, 10], 20, 4)
    assert len(many) == 20 and many.count(0) == many.count(2) == 4
    with pytest.raises(UsageError, match="take 12 steps"):
        step_slots([10, 10, 10], 5, 4)


def test_weights_on_silent_inputs_leave_first():
    x, y = samples()
    x[:, 3] = 0
    module = network()
    # the silent input's weights are the largest, so that all are kept at first; nothing else may hold them
    module[0].weight.data[:, 3] = 5.0
    changes = {"fix_pruned": 0.0, "fix_kept": 0.0, "block": 400, "steps": 2, "epochs": 1, "remove_zero_rows": True}
    descent = search(module, (x, y), **changes, selection="magnitude")
    assert descent.masks()["0"][:, 3].all()
    descent.run()
    assert not descent.masks()["0"][:, 3].any()


def network_with(kept):
    """So many weights of input 3 are kept at first, and the others pruned."""
    module = network()
    module[0].weight.data[:, 3] = 1e-4
    module[0].weight.data[:kept, 3] = 5.0
    return module


class Noted(SwapSearch):
    """Keeps what it was asked, and leaves it as it was."""

    takes_factored = False

    def solve(self, Q, k):
        asked.append((len(Q), k))
        return np.arange(len(Q)) < k


asked: list = []


@pytest.mark.parametrize("kept", [0, 5])
def test_behind_weights_that_leave_free_a_solver_starts_at_the_mask_that_is_there(kept, monkeypatch):
    """Free weights that were kept take the places of as many pruned ones: of those whose return helps most."""
    x, y = samples()
    x[:, 3] = 0
    module = network_with(kept)
    asked.clear()
    settings = Descent(block=400, batch=8, fix_pruned=0.0, fix_kept=0.0, remove_zero_rows=True, solver=Noted())
    descent = MaskDescent(module, started(module)[:1], (x, y), class_loss, settings)
    first = descent.masks()["0"]
    assert int(first[:, 3].sum()) == kept
    after = descent.run()["0"]
    others = torch.arange(12) != 3
    assert asked == [(288 - 24, 144 - 24)] and not after[:, 3].any()
    # what was pruned stays so, but for as many as others have taken the places of
    assert int((~first & after)[:, others].sum()) == kept == descent.trace[0].exchanged
    assert not (first & ~after)[:, others].any()
    # the last of the block would be a worse choice
    monkeypatch.setattr("secateur.search.descent.start_with_fewer", lambda Q, ones, k: np.arange(len(Q)))
    [lasting] = MaskDescent(network_with(kept), started(network_with(kept))[:1], (x, y), class_loss, settings).step()
    assert (descent.trace[0].predicted < lasting.predicted) == (kept > 0)


def test_the_ones_that_leave_a_start_are_those_that_gain_most():
    generator = np.random.default_rng(0)
    Q = generator.normal(size=(12, 12))
    Q = Q + Q.T
    assert start_with_fewer(Q, 5, 5).tolist() == list(range(12))
    [left] = set(range(5)) - set(start_with_fewer(Q, 5, 4)[:4].tolist())
    energies = [energy(Q, (np.arange(12) < 5) & (np.arange(12) != i)) for i in range(5)]
    assert left == int(np.argmin(energies))
    order = start_with_fewer(Q, 5, 2)
    assert sorted(order.tolist()) == list(range(12)) and (np.diff(order[2:]) > 0).all() and order[1] < 5
    A = generator.normal(size=(12, 2))
    factored = Factored(A, np.diagonal(Q).copy())
    assert start_with_fewer(factored, 6, 2).tolist() == start_with_fewer(factored.whole(), 6, 2).tolist()


def test_more_silent_weights_than_may_leave_are_drawn_by_lot():
    x, y = samples()
    x[:, :8] = 0
    module = network()
    settings = Descent(block=400, batch=8, fix_pruned=0.0, fix_kept=0.0, remove_zero_rows=True)
    descent = MaskDescent(module, started(module)[:1], (x, y), class_loss, settings)
    keep = descent.run()["0"]
    assert keep[:, 8:].all() and int(keep.sum()) == 144 and int(keep[:, :8].sum()) > 0


@pytest.mark.parametrize("hessian", ["gradient_per_sample", "gradient_mean"])
@pytest.mark.parametrize("selection", ["gradient", "magnitude", "wanda", "random"])
def test_every_choice_makes_moves_and_repeats_itself(hessian, selection):
    first, second = (search(hessian=hessian, selection=selection, epochs=1) for _ in range(2))
    masks, again = first.run(), second.run()
    assert sum(m.exchanged for m in first.trace) and first.trace == second.trace
    assert all(torch.equal(masks[name], again[name]) for name in masks)


def test_a_search_goes_on_from_its_state():
    whole = search(epochs=2)
    whole.run()
    part = search(epochs=2)
    for _ in range(7):
        part.step()
    state = {name: tensor.clone() for name, tensor in part.state().items()}
    later = search(epochs=2)
    later.load_state(state)
    later.run()
    assert later.trace == whole.trace
    assert all(torch.equal(mask, later.masks()[name]) for name, mask in whole.masks().items())


def test_a_side_with_nothing_to_choose_from_makes_no_move():
    descent = search(fix_pruned=1.0, epochs=1)
    first = descent.masks()
    assert all(torch.equal(mask, first[name]) for name, mask in descent.run().items())
    assert not any(m.exchanged or m.predicted for m in descent.trace)


def test_no_data_and_a_loss_of_nan_are_refused():
    with pytest.raises(DataError, match="empty"):
        search(data=samples(0))
    x, y = samples()
    with pytest.raises(NonFiniteError, match="loss of a batch"):
        search(data=(x * torch.nan, y)).step()
    module = network()
    layers = [Searched("1.0", torch.ones(4, 4) > 0, torch.ones(4, 4))]
    twice = nn.Sequential(nn.Linear(12, 4), nn.Sequential(nn.Linear(4, 4)))
    twice.append(twice[1])
    with pytest.raises(UnsupportedModelError, match="called 2 times"):
        MaskDescent(twice, layers, samples(), class_loss, Descent()).step()
    assert module is not twice


# -- what a batch tells ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradients_of_single_samples_are_those_of_autograd(family):
    model, ids = make_tiny(family).requires_grad_(False), tiny_ids()[:3]
    name = "model.layers.0.mlp.down_proj" if family == "llama" else "transformer.h.0.mlp.c_proj"
    layer = model.get_submodule(name)
    [told] = listen(model, [layer], (ids,), token_loss, samples_at_once=2)
    losses = token_loss(model, (ids,))
    layer.weight.requires_grad_(True)
    each = [torch.autograd.grad(token_loss(model, (ids[i : i + 1],)).sum(), layer.weight)[0] for i in range(3)]
    each = torch.stack([g if family == "llama" else g.T for g in each])
    rows, columns = torch.tensor([0, 5, 7]), torch.tensor([2, 2, 30])
    assert told.loss == pytest.approx(float(losses.mean()), rel=1e-5)
    torch.testing.assert_close(told.mean(), each.mean(0), rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(told.per_sample(rows, columns).float(), each[:, rows, columns], rtol=1e-3, atol=1e-7)
    found = mean_gradients(model, [layer.weight], (ids,), token_loss, samples_at_once=2)[0]
    torch.testing.assert_close(found if family == "llama" else found.T, each.mean(0), rtol=1e-3, atol=1e-7)
    assert not layer.weight.requires_grad


def test_exact_second_derivatives_are_differences_of_gradients():
    module, batch = network().double(), (samples()[0].double(), samples()[1])
    weight, places = module[0].weight, (torch.tensor([0, 3, 5]), torch.tensor([1, 1, 7]))
    H = exact_hessian(module, weight, places, batch, class_loss)
    step = 1e-5
    for i in range(3):
        sides = []
        for sign in (1, -1):
            moved = copy.deepcopy(module)
            with torch.no_grad():
                moved[0].weight[places[0][i], places[1][i]] += sign * step
            moved[0].weight.requires_grad_(True)
            sides.append(torch.autograd.grad(class_loss(moved, batch).mean(), moved[0].weight)[0][places])
        torch.testing.assert_close(H[i], (sides[0] - sides[1]) / (2 * step), rtol=1e-5, atol=1e-8)


# -- the method --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["wanda", "magnitude", "gradient", "random"])
def test_plans_keep_the_number_of_weights_of_their_start(start):
    model, ids = build_llama(), tiny_ids()
    options = {"sparsity": 0.4, "start": start, "block": 64, "batch": 4, "checks": 2}
    plan = plan_for("icbs", model, ids, **options)
    assert len(plan.masks) == 14 and not plan.values
    for name, mask in plan.masks.items():
        rows, columns = mask.shape
        gone = rows * int(columns * 0.4) if start == "wanda" else int(mask.numel() * 0.4)
        assert int((~mask).sum()) == gone, name
    if start in ("wanda", "magnitude"):
        scope = {"scope": "row" if start == "wanda" else "layer"}
        before = plan_for(start, model, ids, sparsity=0.4, **scope)
        # the first block of the two is the same for both; what was searched differs
        differing = [n for n in plan.masks if not torch.equal(plan.masks[n], before.masks[n])]
        assert len(differing) > 7


def test_scores_are_those_that_the_start_names():
    w, gradient = torch.tensor([[1.0, -2.0]]), torch.tensor([[-3.0, 1.0]])
    target = Target("m", "weight", 0, w)
    assert make_method("icbs", {"start": "gradient"}).score(target, {"gradient": gradient}).tolist() == [[3.0, 2.0]]
    assert make_method("icbs", {"start": "magnitude"}).score(target, {}).tolist() == [[1.0, 2.0]]
