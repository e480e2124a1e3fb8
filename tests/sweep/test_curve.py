"""Curves: what lies between the points, the knee, and the setting that is recommended."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import secateur as sc
from secateur.errors import UsageError
from secateur.observe.calibration import builtin_text
from secateur.report import Metric
from secateur.sweep.curve import curve_of, knee_of, predicted_at, through
from secateur.sweep.records import DENSE, Record
from secateur.sweep.runner import Results
from secateur.sweep.spec import make_sweep

PERPLEXITY = Metric("perplexity:builtin", "", {}, False, "2 windows")
ACCURACY = Metric("lm_eval:task acc", "", {}, True)


@given(st.lists(st.tuples(st.floats(0.02, 0.2), st.floats(5, 500)), min_size=3, max_size=6))
def test_a_prediction_meets_what_was_run_and_stays_between_it(steps):
    sparsities = np.cumsum([0.0, *(round(step, 2) for step, _ in steps[1:])]).round(2)
    values = {float(s): perplexity for s, (_, perplexity) in zip(sparsities, steps, strict=True)}
    curve = through(values, PERPLEXITY)
    for sparsity, perplexity in values.items():
        assert predicted_at(curve, sparsity) == pytest.approx(perplexity)
    for left, right in itertools.pairwise(values):
        low, high = sorted((values[left], values[right]))
        inside = [p for s, p in zip(curve.grid, curve.predicted, strict=True) if left <= s <= right]
        assert min(inside) >= low * (1 - 1e-9) and max(inside) <= high * (1 + 1e-9)


@given(st.floats(2, 12))
def test_the_knee_of_an_exponential_is_where_its_slope_is_that_of_the_chord(rate):
    x = np.linspace(0, 1, 2001)
    expected = math.log((math.exp(rate) - 1) / rate) / rate
    assert x[knee_of(x, np.exp(rate * x))] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("y", [[1, 2, 3, 4], [4, 3, 2, 1], [1, 3, 3.5, 3.6]])
def test_what_never_lies_below_its_line_has_its_knee_at_the_end(y):
    assert knee_of([0, 1, 2, 3], y) == 3


@given(st.floats(0.1, 10), st.floats(1, 100))
def test_scale_of_the_axes_moves_no_knee(stretch, height):
    x, y = np.linspace(0, 1, 50), np.linspace(0, 1, 50) ** 4
    assert knee_of(stretch * x, 7 + height * y) == knee_of(x, y)


def test_a_curve_recommends_its_knee_or_what_stays_within_a_factor():
    # log perplexity 3 + 8 s^4 / 0.4096: flat, then steep
    values = {s: math.exp(3 + 8 * (s / 0.8) ** 4) for s in (0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8)}
    curve = through(values, PERPLEXITY)
    # where 4 t^3 = 1
    assert curve.knee == curve.recommended == pytest.approx(0.8 * 0.25 ** (1 / 3), abs=0.015)
    assert predicted_at(curve, 0.3) == pytest.approx(math.exp(3 + 8 * 0.375**4), rel=0.05)
    within = through(values, PERPLEXITY, within=1.5)
    assert within.recommended == pytest.approx(0.8 * (math.log(1.5) / 8) ** 0.25, abs=0.02)
    assert predicted_at(within, within.recommended) <= 1.5 * values[0]
    # the runs themselves are on the grid
    assert [predicted_at(curve, s) for s in values] == pytest.approx(list(values.values()))


def test_accuracies_fall_and_are_not_put_on_a_logarithm():
    values = {0.0: 0.8, 0.3: 0.78, 0.5: 0.7, 0.7: 0.3}
    curve = through(values, ACCURACY, within=1.2)
    assert curve.higher_is_better and 0.3 < curve.knee <= 0.5
    assert predicted_at(curve, curve.recommended) >= 0.8 / 1.2
    assert curve.predicted[-1] == pytest.approx(0.3)


def test_a_quality_below_zero_may_be_a_multiple_of_the_dense_one():
    values = {0.0: -10.0, 0.2: -10.5, 0.4: -12.0, 0.6: -20.0}
    curve = through(values, ACCURACY, within=1.2)
    assert curve.recommended == pytest.approx(0.4)
    assert through(values, ACCURACY, within=1.05).recommended == pytest.approx(0.2)


def test_a_small_metric_that_reaches_zero_is_not_put_on_a_logarithm():
    values = {0.0: 0.0, 0.2: 0.0, 0.4: 0.01, 0.6: 0.25}
    curve = through(values, PERPLEXITY, within=1.5)
    assert min(curve.predicted) == 0.0 and predicted_at(curve, 0.6) == pytest.approx(0.25)
    # below its line it lies furthest before the last point, not where it was an instant above 0
    assert 0.3 < curve.knee < 0.6
    # of nothing there is no multiple
    assert curve.recommended == pytest.approx(0.2)


def test_a_small_metric_below_zero_may_be_a_part_of_the_dense_one():
    values = {0.0: -2.0, 0.2: -1.9, 0.4: -1.0, 0.6: -0.5}
    within = [through(values, PERPLEXITY, within=factor).recommended for factor in (2 / 1.9, 2.0, 4.0)]
    assert within == pytest.approx([0.2, 0.4, 0.6])


def test_nothing_stays_within_a_factor_that_the_first_point_exceeds():
    assert through({0.0: 10.0, 0.2: 50.0, 0.4: 60.0}, PERPLEXITY, within=1.001).recommended == 0.0


def test_two_points_are_too_few():
    with pytest.raises(UsageError, match="two sparsities besides the dense model"):
        through({0.0: 10.0, 0.5: 20.0}, PERPLEXITY)


def results_of(dense, *values):
    """A sweep over sparsities whose accuracies are these."""
    grid = {"sparsity": [0.3, 0.5, 0.7][: len(values)]}
    sweep = make_sweep({"model": "m", "steps": [{"method": "wanda"}], "sweep": {"grid": grid}}, "here")

    def record(name, value, **sparsity):
        return Record(name, name, sparsity, metrics=(Metric("accuracy", "", {name: value}, True),))

    points = [record(p.name, value, **p.values) for p, value in zip(sweep.points, values, strict=True)]
    return Results(sweep, record(DENSE, dense), points)


def test_a_dense_model_that_gets_nothing_right_has_a_curve():
    assert curve_of(results_of(0.0, 0.0, 0.01, 0.0)).points == {0.0: 0.0, 0.3: 0.0, 0.5: 0.01, 0.7: 0.0}


def test_a_dense_model_without_a_finite_quality_has_none():
    with pytest.raises(UsageError, match="whose accuracy is no finite number"):
        curve_of(results_of(float("nan"), 0.5, 0.4))


@pytest.fixture(scope="module")
def trained(make_llama, tiny_tokenizer):
    """A tiny model that has learnt something, so that pruning has something to lose."""
    model = make_llama(num_hidden_layers=2, hidden_size=64, intermediate_size=128)
    ids = tiny_tokenizer(builtin_text("calibration"), return_tensors="pt").input_ids[0]
    windows = ids[: len(ids) // 64 * 64].reshape(-1, 64)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(120):
        batch = windows[torch.randint(len(windows), (8,), generator=generator)]
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def test_a_prediction_holds_against_full_runs(trained, tiny_tokenizer):
    def perplexity(sparsity):
        plan = sc.plan(trained, None, method="random", sparsity=sparsity)
        table = sc.evaluate(
            {"m": sc.apply(plan, trained)}, tiny_tokenizer, ["perplexity:builtin"], length=64, windows=8
        )
        return table["perplexity"].values["m"]

    ran = {sparsity: perplexity(sparsity) for sparsity in (0.0, 0.3, 0.6, 0.9)}
    # 512 tokens that are equally likely are what it started from
    assert 1.15 * ran[0.0] < ran[0.9] and ran[0.0] < 60
    curve = through(ran, PERPLEXITY)
    for sparsity in (0.1, 0.2, 0.45, 0.75, curve.knee):
        assert math.log(predicted_at(curve, sparsity)) == pytest.approx(math.log(perplexity(sparsity)), abs=0.07)
