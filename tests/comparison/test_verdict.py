"""Who is best, and how sure that is: the bootstrap on samples whose answer is known, and the sentences."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest

from secateur.comparison.rows import Row
from secateur.comparison.verdict import SURE, Candidate, judge, probability_better
from secateur.report import Metric
from secateur.sweep.records import Record

WINDOWS = np.random.default_rng(5).normal(3.0, 0.5, 40)


def test_a_difference_in_every_window_is_certain():
    # however much windows differ from each other, they differ together
    assert probability_better(WINDOWS - 0.001, WINDOWS, higher_is_better=False) == 1.0
    assert probability_better(WINDOWS - 0.001, WINDOWS, higher_is_better=True) == 0.0


def test_equal_losses_tell_nothing():
    assert probability_better(WINDOWS, WINDOWS.copy(), higher_is_better=False) == 0.5


@pytest.mark.parametrize("shift", [0.0, 0.01, 0.03])
def test_it_is_that_of_a_normal_mean(shift):
    difference = np.random.default_rng(1).normal(size=400)
    difference = 0.2 * (difference - difference.mean()) / difference.std() - shift
    expected = NormalDist().cdf(shift * 20 / 0.2)
    losses = np.random.default_rng(2).normal(3.0, 1.0, 400)
    assert probability_better(losses + difference, losses, higher_is_better=False) == pytest.approx(expected, abs=0.02)


def test_both_sides_add_up_to_one():
    noise = np.random.default_rng(3).normal(0, 0.1, 40)
    first = probability_better(WINDOWS + noise, WINDOWS, higher_is_better=False)
    assert probability_better(WINDOWS, WINDOWS + noise, higher_is_better=False) == pytest.approx(1 - first)


def cauchy(t):
    """The distribution of Student's t with one degree of freedom."""
    return 0.5 + math.atan(t) / math.pi


def test_seeds_are_drawn_anew_as_well():
    # one seed far better, one far worse, and the mean a little better: which seeds one gets decides
    several = np.stack([WINDOWS - 1.0, WINDOWS + 0.9])
    chance = probability_better(several, WINDOWS, higher_is_better=False)
    # the mean is 0.05 better, and its standard error 1.9 / 2
    assert chance == pytest.approx(cauchy(0.05 / 0.95), abs=0.02)
    # with the mean of the seeds alone it would be certain
    assert probability_better(several.mean(axis=0), WINDOWS, higher_is_better=False) == 1.0


def test_a_draw_is_judged_by_what_methods_are_ranked_by():
    # the mean loss of the seeds is below the other method's, the mean perplexity above
    several = np.stack([WINDOWS - 1.0, WINDOWS + 0.9])
    candidates = [
        Candidate("even", math.exp(WINDOWS.mean()), (WINDOWS.tolist(),)),
        Candidate("far apart", float(np.exp(several.mean(axis=1)).mean()), tuple(several.tolist())),
    ]
    found = judge(0.2, "perplexity:t", candidates, higher_is_better=False, exponential=True)
    ahead = math.log((math.exp(-1.0) + math.exp(0.9)) / 2)
    assert found.best == "even"
    assert found.probability == pytest.approx(cauchy(ahead / 0.95), abs=0.02)
    loss = judge(0.2, "loss:t", candidates, higher_is_better=False).probability
    assert loss == pytest.approx(cauchy(-0.05 / 0.95), abs=0.02)


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("paired", [True, False])
def test_a_method_is_rarely_found_better_than_itself(seeds, paired):
    # a draw of the calibration text changes all windows alike, and far more than they differ otherwise
    generator, trials, found, naive, few = np.random.default_rng(4), 200, 0, 0, 0
    for _ in range(trials):
        first, second = (
            3 + generator.normal(0, 0.1, (count, 1)) + generator.normal(0, 0.1, (count, 20))
            for count in (seeds, seeds if paired else 2 * seeds)
        )
        found += certain(probability_better(first, second, higher_is_better=False, resamples=500))
        # windows alone: the means over seeds, as if another draw gave the same
        means = first.mean(axis=0), second.mean(axis=0)
        naive += certain(probability_better(*means, higher_is_better=False, resamples=500))
        few += certain(resampled_seeds(first, second, generator))
    # either of the two may be found better with 0.95, so that a tenth is nominal; 0.17 is three standard errors above
    assert found / trials < 0.17
    assert naive / trials > 0.3
    assert few / trials > found / trials


def certain(probability):
    return max(probability, 1 - probability) >= SURE


def resampled_seeds(first_SN, second_SN, generator):
    """The bootstrap that draws the few seeds with replacement."""
    first_R, second_R = (
        one.mean(axis=1)[generator.integers(len(one), size=(500, len(one)))].mean(axis=1)
        for one in (first_SN, second_SN)
    )
    return float((first_R < second_R).mean())


def test_what_is_always_many_times_as_bad_is_told_apart():
    # perplexities of 3 thousand, 300 thousand and 10 million beside 20: their mean is no more than its standard error
    chance = np.stack([WINDOWS + 5, WINDOWS + 9.6, WINDOWS + 13.1])
    good = np.stack([WINDOWS, WINDOWS + 0.01, WINDOWS - 0.01])
    assert probability_better(good, chance, higher_is_better=False, exponential=True) > SURE


def test_seeds_that_two_methods_share_are_paired():
    # both suffer alike from a bad calibration text, and one is always a little better
    shift_S1 = np.array([0.0, 0.5, 1.0])[:, None]
    worse = WINDOWS + shift_S1
    better = worse - np.array([0.010, 0.011, 0.012])[:, None]
    assert probability_better(better, worse, higher_is_better=False) > 0.98


def test_the_same_seed_gives_the_same_answer():
    noise = np.random.default_rng(3).normal(0, 0.1, 40)
    chances = [probability_better(WINDOWS + noise, WINDOWS, higher_is_better=False, seed=s) for s in (0, 0, 1)]
    assert chances[0] == chances[1] != chances[2]


def candidate(name, value, shift=None, noise=0.0):
    parts = () if shift is None else ((WINDOWS + shift + np.random.default_rng(9).normal(0, 1, 40) * noise).tolist(),)
    return Candidate(name, value, parts)


def test_a_clear_winner_is_told_with_its_probability():
    found = judge(
        0.2, "perplexity:t", [candidate("b", 30, 0.1), candidate("a", 25, 0.0)], higher_is_better=False, dense=20.0
    )
    assert (found.best, found.runner_up, found.rivals, found.probability) == ("a", "b", (), 1.0)
    assert found.sentence == (
        "Sparsity 0.2: a is best, with perplexity:t 25 (20 dense); it is better than b (30) with a probability of more "
        "than 0.99."
    )


def test_what_the_windows_do_not_decide_is_not_distinguishable():
    several = [candidate("a", 25.0, 0.0), candidate("b", 25.1, 0.001, noise=0.2), candidate("c", 40.0, 0.5)]
    found = judge(0.4, "perplexity:t", several, higher_is_better=False)
    assert found.best == "a" and found.rivals == ("b",) and found.probability is not None and found.probability < SURE
    assert found.sentence.startswith(
        "Sparsity 0.4: a and b are not distinguishable, with perplexity:t 25 and 25.1; a is better than b with a "
        "probability of 0."
    )
    assert found.probabilities is not None and found.probabilities["c"] == 1.0


def test_higher_may_be_better():
    found = judge(0.2, "acc", [candidate("low", 0.3, 0.0), candidate("high", 0.4, 0.1)], higher_is_better=True)
    assert (found.best, found.probability) == ("high", 1.0)


@pytest.mark.parametrize(
    ("candidates", "said"),
    [
        ([], "Sparsity 0.2: no method met the budget and could be measured by m."),
        ([candidate("a", 25.0, 0.0)], "Sparsity 0.2: a is the only method that met the budget, with m 25 (20 dense)."),
        (
            [candidate("a", 25.0), candidate("b", 26.0, 0.1)],
            "Sparsity 0.2: a is ahead, with m 25 (20 dense), before b (26); how sure that is can't be told, since "
            "nothing but the mean is known of this metric.",
        ),
    ],
)
def test_sentences_where_nothing_can_be_held_against_each_other(candidates, said):
    found = judge(0.2, "m", candidates, higher_is_better=False, dense=20.0)
    assert found.sentence == said and found.probability is None


def test_a_seed_without_a_number_leaves_no_mean_of_the_others():
    def row(*values):
        names = [f"random-seed={n}" for n in range(len(values))]
        records = [Record(n, n, metrics=(Metric("m", "", {n: v}, False),)) for n, v in zip(names, values, strict=True)]
        return Row("random", 0.5, tuple(records), 0.01)

    whole = row(10.0, 12.0)
    assert (whole.mean("m"), whole.values("m")) == (11.0, [10.0, 12.0])
    broken = row(10.0, float("inf"))
    assert broken.mean("m") is None and broken.spread("m") is None and broken.values("m") == []
