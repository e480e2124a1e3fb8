"""Oracles of admm, alps, obc and osscar as methods: how many leave, who competes, and what the options mean."""

from __future__ import annotations

import math

import pytest
import torch

from secateur.healing import problem_of
from secateur.methods import Target, make_method
from secateur.observe import Cross, Gram
from secateur.solver import refit, refit_columns

DOUBLE = torch.float64


def data(outputs=12, inputs=24, tokens=300, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=DOUBLE)

    x = normal(tokens, 8) @ normal(8, inputs) / 8**0.5 + 0.5 * normal(tokens, inputs)
    return normal(outputs, inputs), x.reshape(3, -1, inputs)


def seen_of(x, dense=None):
    gram, cross = Gram(), Cross()
    gram.update(x)
    if dense is None:
        return {"gram": gram}
    cross.update_pair(x, dense)
    return {"gram": gram, "heal.cross": cross}


def prune(method, w, seen, **options):
    keep, weight, notes = make_method(method, options).prune(Target("m", "weight", 0, w), seen)
    assert torch.equal(weight != 0, keep)
    return keep, weight, notes


def error(w, pruned, x):
    return float((x @ (w - pruned).T).square().sum())


@pytest.mark.parametrize("method", ["admm", "alps", "obc", "sparsegpt"])
@pytest.mark.parametrize("sparsity", [0.5, 0.7])
def test_exactly_the_fraction_leaves(method, sparsity):
    w, x = data()
    keep, _, notes = prune(method, w, seen_of(x), sparsity=sparsity)
    gone = w.numel() * sparsity
    assert int((~keep).sum()) == (math.ceil(gone) if method == "obc" else int(gone)) and not notes


def test_better_methods_lose_less_of_the_outputs():
    lost = dict.fromkeys(("sparsegpt", "admm", "alps", "obc"), 0.0)
    for seed in range(4):
        w, x = data(seed=seed)
        for method in lost:
            lost[method] += error(w, prune(method, w, seen_of(x), sparsity=0.6)[1], x)
    assert max(lost["alps"], lost["obc"]) < lost["admm"] < lost["sparsegpt"]


def test_obc_is_least_squares_on_its_support_and_takes_what_costs_least_first():
    w, x = data()
    keep, weight, _ = prune("obc", w, seen_of(x), sparsity=0.4)
    flat = x.reshape(-1, 24)
    for row, mask, old in zip(weight, keep, w, strict=True):
        torch.testing.assert_close(row[mask], torch.linalg.lstsq(flat[:, mask], flat @ old[:, None]).solution[:, 0])
    one, _, _ = prune("obc", w, seen_of(x), sparsity=1 / w.numel())
    costs = w.square() / torch.linalg.inv(flat.T @ flat).diagonal()
    assert (~one).nonzero().tolist() == [list(divmod(int(costs.argmin()), 24))]
    # rows compete: a row of small weights loses more of them
    w[0] *= 0.01
    rows = (~prune("obc", w, seen_of(x), sparsity=0.4)[0]).sum(dim=1)
    assert int(rows[0]) == int(rows.max()) > int(rows[1:].max())


@pytest.mark.parametrize("method", ["admm", "alps", "obc", "sparsegpt"])
def test_weights_of_silent_inputs_leave_first_however_quiet_the_others_are(method):
    w, x = data()
    x[..., [3, 7]] = 0
    for loudness in (1e-3, 1.0, 1e3):
        keep, _, _ = prune(method, w, seen_of(loudness * x), sparsity=0.5)
        assert not keep[:, [3, 7]].any()
    if method != "sparsegpt":
        # what needn't leave stays as it is
        keep, weight, _ = prune(method, w, seen_of(1e-3 * x), sparsity=1 / 24)
        kept = keep[:, [3, 7]]
        assert int(kept.sum()) == len(w)
        torch.testing.assert_close(weight[:, [3, 7]][kept], w[:, [3, 7]][kept])


@pytest.mark.parametrize("method", ["admm", "alps", "obc", "sparsegpt"])
def test_how_loud_inputs_are_changes_nothing_where_some_are_silent(method):
    """Damping is relative to the inputs that there are, whose share of it is no larger when they are quiet."""
    w, x = data()
    x[..., [3, 7, 8, 20]] = 0
    loud, quiet = (prune(method, w, seen_of(scale * x), damping=0.01) for scale in (1.0, 1e-4))
    assert torch.equal(loud[0], quiet[0])
    torch.testing.assert_close(loud[1], quiet[1], rtol=1e-4, atol=1e-6)


def test_a_silent_neuron_leaves_first_by_osscar():
    w, x = data()
    x[..., 5] = 0
    target = Target("m", "neuron", 0, w, torch.arange(24)[:, None])
    for loudness in (1e-3, 1.0):
        assert int(make_method("osscar").score(target, seen_of(loudness * x)).argmin()) == 5


def test_rows_of_admm_compete_among_themselves_where_they_are_told_to():
    w, x = data()
    w[0] *= 0.01
    matrix, row = (prune("admm", w, seen_of(x), scope=scope)[0] for scope in ("layer", "row"))
    assert int(matrix[0].sum()) == 0 and (row.sum(dim=1) == 12).all()


def test_a_gradual_admm_begins_with_fewer_zeros_and_ends_with_as_many():
    method = make_method("admm", {"sparsity": 0.8, "gradual": True})
    fractions = [method._rule_at(step).sparsity for step in range(15)]
    assert fractions == sorted(fractions) and fractions[0] == pytest.approx(0.8 * (1 - (14 / 15) ** 3))
    assert fractions[-1] == 0.8
    w, x = data()
    gradual, plain = (prune("admm", w, seen_of(x), sparsity=0.8, gradual=g)[0] for g in (True, False))
    assert int(gradual.sum()) == int(plain.sum()) and not torch.equal(gradual, plain)


def test_the_steps_of_alps_end_in_a_refit_and_are_limited():
    w, x = data()
    seen = seen_of(x)
    rough, fine = (prune("alps", w, seen, refit_steps=steps) for steps in (0, 10))
    problem = problem_of("m", w, seen, 0.01)[0]
    assert torch.equal(rough[0], fine[0]) and problem.loss(fine[1]) < problem.loss(rough[1])
    torch.testing.assert_close(fine[1], refit(problem, fine[0], rough[1]))
    assert "had not settled after 3 steps" in prune("alps", w, seen_of(x), steps=3)[2][0]


@pytest.mark.parametrize("method", ["admm", "alps", "obc"])
def test_what_is_wanted_may_come_from_the_dense_model(method):
    w, x = data()
    # where both networks give the same inputs the target makes no difference
    plain, same = (prune(method, w, seen)[1] for seen in (seen_of(x), seen_of(x, x)))
    torch.testing.assert_close(same, plain, rtol=1e-6, atol=1e-8)
    dense = x + 0.5 * torch.roll(x, 1, dims=2)
    fitted = prune(method, w, seen_of(x, dense))[1]
    wanted = dense @ w.T
    assert float((x @ fitted.T - wanted).square().sum()) < float((x @ plain.T - wanted).square().sum())


def target(w, kind="neuron", width=1):
    return Target("m", kind, 0, w, torch.arange(w.shape[1]).reshape(-1, width))


def test_osscar_ranks_by_what_the_others_can_not_make_up_for():
    w, x = data()
    # one that is the sum of two others can go first, however loud it is
    x[..., 5] = 3 * (x[..., 1] + x[..., 2])
    method = make_method("osscar", {"neuron_update": 1, "damping": 1e-9})
    rank = method.score(target(w), seen_of(x))
    assert int(rank.argmin()) in (1, 2, 5) and sorted(rank.tolist()) == list(range(24))


def test_swaps_of_osscar_never_make_it_worse_and_keep_the_number():
    better = 0
    for seed in range(4):
        w, x = data(seed=seed)
        seen, mine = seen_of(x), target(w, "kv_head", 2)
        method = make_method("osscar", {"head_update": 6, "local_search": True, "swap_heads": 2})
        problem = problem_of("m", w, seen, 0.01, exact=True)[0]
        gone = method.score(mine, seen).argsort()[:6].sort().values
        swapped = method.revise(mine, seen, gone)

        def loss(units, problem=problem):
            columns = torch.zeros(24, dtype=torch.bool)
            columns[torch.arange(24).reshape(-1, 2)[units].flatten()] = True
            return problem.loss(refit_columns(problem, columns))

        assert len(swapped) == 6 and torch.equal(swapped, swapped.sort().values)
        assert loss(swapped) <= loss(gone) + 1e-9
        better += loss(swapped) < loss(gone)
        assert torch.equal(make_method("osscar").revise(mine, seen, gone), gone)
    assert better
