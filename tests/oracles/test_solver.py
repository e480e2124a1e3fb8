"""Oracles of the second-order solver, in float64: torch.linalg.lstsq, and the identities of the papers.

The synthetic problem has inputs of low rank with noise and a few loud columns, and weights of uneven size.
"""

from __future__ import annotations

import pytest
import torch

from secateur.allocate import NofM, PerMatrix, PerRow
from secateur.errors import NonFiniteError
from secateur.solver import (
    Curvature,
    admm,
    alps,
    downdated,
    elimination,
    gains,
    greedy,
    masked_cg,
    masked_exact,
    refit,
    refit_columns,
    removal_losses,
    spread,
    swaps,
)
from secateur.solver.alps import Penalty

DOUBLE = torch.float64


def synthetic(seed=0, tokens=600, inputs=96, rank=24, outputs=64):
    """(weight [outputs, inputs], inputs [tokens, inputs]) of the sheet's problem."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=DOUBLE)

    x = normal(tokens, rank) @ normal(rank, inputs) / rank**0.5 + 0.4 * normal(tokens, inputs)
    x[:, :4] *= 6
    # a Gamma(2, 1/2) variable is the sum of two exponential ones
    scale = -0.5 * torch.rand(2, outputs, inputs, generator=generator, dtype=DOUBLE).clamp_min(1e-12).log().sum(dim=0)
    return normal(outputs, inputs) * scale, x


def small(seed=0):
    return synthetic(seed, tokens=80, inputs=20, rank=8, outputs=7)


def error(w, pruned, x):
    return float((x @ (w - pruned).T).square().sum())


def wanda_mask(w, x, sparsity):
    return PerRow(sparsity).keep(w.abs() * x.norm(dim=0))


def test_a_refit_is_the_least_squares_solution_on_its_support():
    w, x = small()
    keep = wanda_mask(w, x, 0.6)
    found = refit(Curvature.of(x.T @ x, 0.0).problem(w), keep)
    for row, mask, old in zip(found, keep, w, strict=True):
        expected = torch.linalg.lstsq(x[:, mask], x @ old[:, None]).solution.flatten()
        torch.testing.assert_close(row[mask], expected, rtol=1e-8, atol=1e-9)
        assert not row[~mask].any()


def test_the_loss_of_a_refit_is_what_the_removal_form_says():
    w, x = small()
    inverse = torch.linalg.inv(x.T @ x)
    keep = wanda_mask(w, x, 0.5)
    problem = Curvature.of(x.T @ x, 0.0).problem(w)
    found = refit(problem, keep)
    increase = 0.0
    for row, mask in zip(w, keep, strict=True):
        gone = (~mask).nonzero().flatten()
        increase += float(row[gone] @ torch.linalg.solve(inverse[gone][:, gone], row[gone]))
    assert increase == pytest.approx(error(w, found, x), rel=1e-8)
    assert 2 * (problem.loss(found) - problem.loss(w)) == pytest.approx(increase, rel=1e-8)


def test_damping_pulls_towards_the_dense_weight_and_keeps_it_when_nothing_leaves():
    w, x = small()
    everything = torch.ones_like(w, dtype=torch.bool)
    for on in ("inputs", "unit"):
        torch.testing.assert_close(refit(Curvature.of(x.T @ x, 0.3, on).problem(w), everything), w)


@pytest.mark.parametrize("steps", [1, 3, 20])
def test_conjugate_gradients_keep_the_mask_and_reach_the_exact_refit(steps):
    w, x = synthetic()
    problem, keep = Curvature.of(x.T @ x, 0.01).problem(w), wanda_mask(w, x, 0.7)
    exact = masked_exact(problem.h_II, problem.g_OI, keep)
    losses = []
    for taken in range(steps + 1):
        found = masked_cg(problem.h_II, problem.g_OI, keep, problem.start_OI, steps=taken, rtol=0.0)
        assert not found[~keep].any()
        losses.append(problem.loss(problem.unscaled(found)))
    assert losses == sorted(losses, reverse=True)
    if steps == 20:
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4 * float(exact.abs().max()))


def test_conjugate_gradients_stop_row_by_row_and_a_float32_row_that_is_done_stays():
    w, x = small()
    w[2] = 0
    problem = Curvature.of((x.T @ x).float(), 0.01).problem(w.float())
    keep = wanda_mask(w, x, 0.5)
    found = masked_cg(problem.h_II, problem.g_OI, keep, problem.start_OI, steps=500)
    assert torch.isfinite(found).all() and not found[2].any()
    residual = ((problem.g_OI - found @ problem.h_II) * keep).norm(dim=1)
    assert bool((residual <= 1.01e-4 * (problem.g_OI * keep).norm(dim=1)).all())


def test_outputs_of_the_dense_network_are_fitted_from_other_inputs():
    w, x_dense = small()
    x = x_dense + 0.2 * torch.randn(x_dense.shape, generator=torch.Generator().manual_seed(3), dtype=DOUBLE)
    keep = wanda_mask(w, x, 0.5)
    problem = Curvature.of(x.T @ x, 0.0).problem(w, x.T @ x_dense)
    found = refit(problem, keep)
    wanted = x_dense @ w.T
    for row, mask, y in zip(found, keep, wanted.T, strict=True):
        torch.testing.assert_close(row[mask], torch.linalg.lstsq(x[:, mask], y[:, None]).solution.flatten())
    start = problem.unscaled(problem.start_OI)
    torch.testing.assert_close(start, torch.linalg.lstsq(x, wanted).solution.T)


def test_inputs_that_are_never_active_keep_their_weight():
    w, x = small()
    x[:, 5] = 0
    keep = torch.ones_like(w, dtype=torch.bool)
    keep[:, 3] = False
    for cross in (None, x.T @ x):
        found = refit(Curvature.of(x.T @ x, 0.01).problem(w, cross), keep)
        torch.testing.assert_close(found[:, 5], w[:, 5])


def test_a_singular_matrix_is_damped_further_and_the_damping_is_known():
    _, x = small()
    found = Curvature.of((x[:4].T @ x[:4]).float(), 0.0)
    assert found.damping > 0 and torch.isfinite(found.inverse()).all()
    with pytest.raises(NonFiniteError, match="NaN or inf"):
        Curvature.of(torch.full((3, 3), float("nan")), 0.01)
    with pytest.raises(NonFiniteError, match="stays singular at a damping of 10"):
        Curvature.of(torch.tensor([[1.0, 30.0], [30.0, 1.0]]), 0.01)


def test_columns_are_refitted_together():
    w, x = small()
    gone = torch.zeros(20, dtype=torch.bool)
    gone[[1, 7, 8, 15]] = True
    found = refit_columns(Curvature.of(x.T @ x, 0.0).problem(w), gone)
    expected = torch.linalg.lstsq(x[:, ~gone], x @ w.T).solution.T
    torch.testing.assert_close(found[:, ~gone], expected)
    assert not found[:, gone].any()


def test_admm_with_a_fixed_mask_converges_to_the_ridge_refit():
    w, x = small()
    keep, curvature = wanda_mask(w, x, 0.5), Curvature.of(x.T @ x, 0.1, "unit")
    found, _ = admm(curvature.problem(w), lambda scores, step: keep, steps=300, mask_steps=1)
    h = x.T @ x
    h = h + 0.1 * torch.diag(h.diagonal())
    for row, mask, old in zip(found, keep, w, strict=True):
        torch.testing.assert_close(
            row[mask], torch.linalg.solve(h[mask][:, mask], (h @ old)[mask]), rtol=1e-9, atol=1e-9
        )


def test_admm_starts_from_the_mask_of_wanda_and_keeps_a_weight_of_which_nothing_leaves():
    w, x = small()
    seen = []

    def choose(scores, step):
        seen.append(scores.clone())
        return torch.ones_like(scores, dtype=torch.bool)

    found, _ = admm(Curvature.of(x.T @ x, 0.1, "unit").problem(w), choose)
    torch.testing.assert_close(seen[0], w.abs() * x.norm(dim=0))
    torch.testing.assert_close(found, w)
    assert len(seen) == 15


def test_a_large_penalty_keeps_alps_on_the_support_of_wanda():
    w, x = small()
    rule = PerMatrix(0.5)
    _, keep, _ = alps(Curvature.of(x.T @ x, 0.0).problem(w), rule.keep, rho=1e12, steps=2)
    assert torch.equal(keep, rule.keep(w.abs() * x.norm(dim=0)))


def test_alps_needs_no_compensation_where_inputs_are_orthogonal():
    w, _ = small()
    rule = PerMatrix(0.5)
    problem = Curvature.of(torch.eye(20, dtype=DOUBLE), 0.0).problem(w)
    found, keep, _ = alps(problem, rule.keep)
    assert torch.equal(keep, rule.keep(w.abs()))
    torch.testing.assert_close(refit(problem, keep, found), w * keep)


@pytest.mark.parametrize("outputs", [4, 30])
def test_alps_finds_a_better_support_than_wanda(outputs):
    w, x = synthetic(tokens=90, inputs=20, rank=8, outputs=outputs)
    curvature = Curvature.of(x.T @ x, 0.01)
    problem, rule = curvature.problem(w), PerMatrix(0.7)
    found, keep, steps = alps(problem, rule.keep)
    assert int(keep.sum()) == round(0.3 * w.numel()) and steps < 300
    assert problem.loss(refit(problem, keep, found)) <= problem.loss(found) + 1e-9
    assert problem.loss(found) < problem.loss(w * rule.keep(w.abs() * x.norm(dim=0)))


def test_the_penalty_follows_what_changes():
    assert Penalty(0.1).after(20, 100, 3) == (Penalty(0.13, raised=True), "go on")
    assert Penalty(0.1).after(2, 100, 3)[0] == Penalty(0.1 * 1.2, raised=True)
    assert Penalty(0.1).after(1, 1000, 3) == (Penalty(0.02), "begin again")
    assert Penalty(0.1).after(0, 1000, 3) == (Penalty(0.02), "go on")
    assert Penalty(0.1, raised=True).after(1, 1000, 3)[0].rho == pytest.approx(0.11)
    assert Penalty(0.1, raised=True).after(0, 1000, 3)[1] == "stop"
    assert Penalty(0.1, raised=True).after(2, 10000, 33)[1] == "stop"
    assert Penalty(9.9e5, raised=True).after(20, 100, 3)[0].rho == 1e6


def test_better_solvers_make_smaller_errors():
    """The order of the sheet at 50 and 70 %, each error a mean over draws."""
    from secateur.solver import inverse_factor, obs_sweep

    totals: dict[str, list[float]] = {}
    for sparsity in (0.5, 0.7):
        found = dict.fromkeys(("wanda", "wanda+refit", "sparsegpt", "sparsegpt+refit", "admm", "alps"), 0.0)
        for seed in range(3):
            w, x = synthetic(seed)
            whole, rule = float((x @ w.T).square().sum()), PerMatrix(sparsity)
            problem = Curvature.of(x.T @ x, 0.01).problem(w)
            keep = wanda_mask(w, x, sparsity)
            swept, mask, _ = obs_sweep(w, inverse_factor(x.T @ x)[0], rule.keep, block=32)
            unit = Curvature.of(x.T @ x, 0.1, "unit").problem(w)
            chosen = alps(problem, rule.keep)
            made = {
                "wanda": w * keep,
                "wanda+refit": refit(problem, keep),
                "sparsegpt": swept,
                "sparsegpt+refit": refit(problem, mask, swept),
                "admm": admm(unit, lambda scores, step, rule=rule: rule.keep(scores))[0],
                "alps": refit(problem, chosen[1], chosen[0]),
            }
            for name, pruned in made.items():
                found[name] += error(w, pruned, x) / whole / 3
        for name, value in found.items():
            totals.setdefault(name, []).append(value)
    for number in range(2):
        at = {name: values[number] for name, values in totals.items()}
        assert at["alps"] < at["admm"] < at["sparsegpt+refit"] < at["wanda+refit"] < at["sparsegpt"] < at["wanda"]


def test_n_of_m_by_alps_beats_a_refit_of_wanda():
    w, x = synthetic()
    problem, rule = Curvature.of(x.T @ x, 0.01).problem(w), NofM(2, 4)
    found, keep, _ = alps(problem, rule.keep)
    assert bool(((~keep).reshape(64, -1, 4).sum(dim=2) == 2).all())
    plain = rule.keep(w.abs() * x.norm(dim=0))
    assert error(w, refit(problem, keep, found), x) < error(w, refit(problem, plain), x) < error(w, w * plain, x)


def naive_obs(w_row, h):
    """One row, weight by weight, with H inverted anew each time: (order, increases of the squared error)."""
    alive, w, order, losses = list(range(len(w_row))), w_row.clone(), [], []
    while alive:
        inverse = torch.linalg.inv(h[alive][:, alive])
        costs = w[alive].square() / inverse.diagonal()
        place = int(costs.argmin())
        order.append(alive[place])
        losses.append(float(costs[place]))
        step = torch.zeros_like(w)
        step[alive] = inverse[:, place] * (w[alive[place]] / inverse[place, place])
        w = w - step
        alive.pop(place)
    return order, losses


def test_greedy_removal_equals_inverting_anew_after_every_weight():
    w, x = small()
    order, losses = greedy(w, torch.linalg.inv(x.T @ x))
    for row in range(len(w)):
        expected, costs = naive_obs(w[row], x.T @ x)
        assert order[row].tolist() == expected
        torch.testing.assert_close(2 * losses[row], torch.tensor(costs, dtype=DOUBLE), rtol=1e-6, atol=1e-9)


def test_the_losses_of_the_steps_are_the_error_of_the_refit():
    w, x = small()
    problem = Curvature.of(x.T @ x, 0.0).problem(w)
    order, losses = greedy(w, torch.linalg.inv(x.T @ x))
    keep = spread(order, losses, 70, w.shape[1])
    assert int((~keep).sum()) == 70
    counted = sum(float(losses[row, : int((~keep[row]).sum())].sum()) for row in range(len(w)))
    assert 2 * counted == pytest.approx(error(w, refit(problem, keep), x), rel=1e-8)


def test_greedy_removal_respects_a_pattern_and_downdates_are_inverses():
    w, x = small()
    inverse = torch.linalg.inv(x.T @ x)
    order, losses = greedy(w, inverse, group=4, most=2)
    keep = spread(order, losses, losses.numel(), 20)
    assert bool(((~keep).reshape(7, 5, 4).sum(dim=2) == 2).all())
    smaller = downdated(inverse, 3)
    left = [j for j in range(20) if j != 3]
    torch.testing.assert_close(smaller[left][:, left], torch.linalg.inv((x.T @ x)[left][:, left]))


def units_of(width, count):
    return torch.arange(width * count).reshape(count, width)


def test_groups_leave_in_the_order_of_their_exact_losses():
    w, x = small()
    problem, columns = Curvature.of(x.T @ x, 0.0).problem(w), units_of(4, 5)
    rank = elimination(problem, columns)
    gone: list[int] = []
    for unit in rank.argsort().tolist()[:3]:
        costs = {}
        for other in set(range(5)) - set(gone):
            left = [int(c) for u in range(5) if u not in (*gone, other) for c in columns[u]]
            costs[other] = float(
                (x @ w.T - x[:, left] @ torch.linalg.lstsq(x[:, left], x @ w.T).solution).square().sum()
            )
        assert unit == min(costs, key=lambda u: costs[u])
        gone.append(unit)


def test_a_joint_removal_equals_one_after_the_other():
    w, x = small()
    problem, columns = Curvature.of(x.T @ x, 0.0).problem(w), units_of(1, 20)
    together, alone = (
        elimination(problem, columns, at_once=20),
        removal_losses(problem.start_OI, problem.curvature.inverse(), list(columns)),
    )
    assert torch.equal(together.argsort(), alone.argsort(stable=True))
    gone = torch.zeros(20, dtype=torch.bool)
    gone[elimination(problem, columns).argsort()[:6]] = True
    swapped = swaps(problem, columns, gone, at_once=3)
    assert int(swapped.sum()) == 6

    def loss(which):
        return problem.loss(refit_columns(problem, which))

    assert loss(swapped) <= loss(gone) + 1e-12


def test_swaps_find_what_was_left_out_by_mistake():
    w, x = small()
    problem, columns = Curvature.of(x.T @ x, 0.0).problem(w), units_of(2, 10)
    best = torch.zeros(10, dtype=torch.bool)
    best[elimination(problem, columns).argsort()[:4]] = True
    worst = torch.zeros(10, dtype=torch.bool)
    worst[elimination(problem, columns).argsort(descending=True)[:4]] = True

    def loss(which):
        return problem.loss(refit_columns(problem, which.repeat_interleave(2)))

    assert loss(swaps(problem, columns, worst, at_once=2)) < loss(worst)
    assert loss(swaps(problem, columns, worst, at_once=2)) < loss(best) + 0.5 * (loss(worst) - loss(best))
    back = gains(problem, columns, best)
    for unit, gain in zip(best.nonzero().flatten().tolist(), back.tolist(), strict=True):
        again = best.clone()
        again[unit] = False
        assert gain == pytest.approx(loss(best) - loss(again), rel=1e-6)


def test_a_double_takes_over_the_weight_of_the_one_that_leaves():
    w, x = small()
    x[:, 9] = x[:, 2]
    gone = torch.zeros(20, dtype=torch.bool)
    gone[9] = True
    found = refit_columns(Curvature.of(x.T @ x, 1e-9).problem(w), gone)
    torch.testing.assert_close(found[:, 2], w[:, 2] + w[:, 9], rtol=1e-5, atol=1e-6)
    assert error(w, found, x) < 1e-6 * float((x @ w.T).square().sum())
