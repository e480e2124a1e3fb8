"""Which method is best at a budget, and how sure that is.

Methods are measured on the same windows, or the same items, so that their differences are paired. Windows are drawn
anew, with replacement and the same ones for all methods, and so are the seeds of a method that ran with several; the
fraction of draws in which one method is better than another is the probability that is told (the paired bootstrap of
P. Koehn, "Statistical Significance Tests for Machine Translation Evaluation", EMNLP 2004; a draw without a difference
counts half). A draw is judged by what methods are ranked by: the mean over seeds of the metric, which for a perplexity
is not the metric of the mean loss. It says how far the text decides, and nothing of other texts or tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from secateur.report.numbers import format_value

RESAMPLES = 10_000
SURE = 0.95
"""below this probability two methods are not distinguishable"""


@dataclass(frozen=True)
class Candidate:
    """A method that met its budget: the mean of a metric over its seeds, and the ``parts`` of every seed's."""

    name: str
    value: float
    parts: tuple[Sequence[float], ...] = ()


@dataclass(frozen=True)
class Verdict:
    """Who is best at ``sparsity`` by ``metric``.

    ``probability`` is that of ``best`` being better than ``runner_up``, None where the metric keeps no parts.
    ``rivals`` are all that the best is better than with a probability below ``SURE``, nearest first. ``values`` are
    the means of all candidates, best first; ``dense`` is that of the dense model.
    """

    sparsity: float
    metric: str
    values: dict[str, float]
    dense: float | None = None
    probabilities: dict[str, float] | None = None
    """candidate → the probability that the best one is better; None where that isn't known"""

    @property
    def best(self) -> str | None:
        return next(iter(self.values), None)

    @property
    def runner_up(self) -> str | None:
        return next(iter(list(self.values)[1:]), None)

    @property
    def probability(self) -> float | None:
        return (self.probabilities or {}).get(self.runner_up or "")

    @property
    def rivals(self) -> tuple[str, ...]:
        return tuple(name for name, chance in (self.probabilities or {}).items() if chance < SURE)

    @property
    def sentence(self) -> str:
        """The verdict for people."""
        return f"Sparsity {self.sparsity:g}: {self._told()}."

    def _told(self) -> str:
        if self.best is None:
            return f"no method met the budget and could be measured by {self.metric}"
        dense = "" if self.dense is None else f" ({format_value(self.dense)} dense)"
        if self.runner_up is None:
            only = format_value(self.values[self.best])
            return f"{self.best} is the only method that met the budget, with {self.metric} {only}{dense}"
        if self.rivals:
            level = [self.best, *self.rivals]
            numbers = _listed([format_value(self.values[name]) for name in level])
            chance = (self.probabilities or {})[self.rivals[0]]
            return (
                f"{_listed(level)} are not distinguishable, with {self.metric} {numbers}{dense}; {self.best} is better"
                f" than {self.rivals[0]} with a probability of {_chance(chance)}"
            )
        ahead = f"with {self.metric} {format_value(self.values[self.best])}{dense}"
        second = f"{self.runner_up} ({format_value(self.values[self.runner_up])})"
        if self.probability is None:
            return (
                f"{self.best} is ahead, {ahead}, before {second}; how sure that is can't be told, since nothing but the"
                " mean is known of this metric"
            )
        chance = _chance(self.probability)
        return f"{self.best} is best, {ahead}; it is better than {second} with a probability of {chance}"


def judge(
    sparsity: float,
    metric: str,
    candidates: Sequence[Candidate],
    *,
    higher_is_better: bool,
    exponential: bool = False,
    dense: float | None = None,
) -> Verdict:
    """Rank the candidates of one budget by one metric, and hold each against the best.

    ``exponential`` where the metric of a seed is the exponential of the mean of its parts.
    """
    ranked = sorted(candidates, key=lambda one: -one.value if higher_is_better else one.value)
    values = {one.name: one.value for one in ranked}
    lengths = {len(parts) for one in ranked for parts in one.parts}
    if len(ranked) < 2 or not all(one.parts for one in ranked) or len(lengths) != 1 or not min(lengths):
        return Verdict(sparsity, metric, values, dense)
    best, *others = ranked
    chances = {
        one.name: probability_better(best.parts, one.parts, higher_is_better=higher_is_better, exponential=exponential)
        for one in others
    }
    return Verdict(sparsity, metric, values, dense, chances)


def probability_better(
    first: ArrayLike,
    second: ArrayLike,
    *,
    higher_is_better: bool,
    exponential: bool = False,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> float:
    """The probability that ``first`` has the better mean when windows and seeds are drawn anew.

    Both are [seeds, windows] of the same windows; the numbers of seeds may differ. ``exponential`` takes the mean over
    seeds of the exponential of every seed's mean. Draws without a difference count half. The draws are those of
    ``seed``.
    """
    first_SN, second_SN = (np.atleast_2d(np.asarray(one, dtype=np.float64)) for one in (first, second))
    generator = np.random.default_rng(seed)
    count_RN = _draws(generator, first_SN.shape[1], resamples)
    first_R, second_R = (_means(one, count_RN, generator, exponential) for one in (first_SN, second_SN))
    better_R = first_R > second_R if higher_is_better else first_R < second_R
    return float(better_R.mean() + 0.5 * (first_R == second_R).mean())


def _means(
    parts_SN: NDArray[np.float64], count_RN: NDArray[np.int64], generator: np.random.Generator, exponential: bool
) -> NDArray:
    """The mean over the windows and seeds of every draw, [draws]; ``count_RN`` says how often each window was drawn."""
    mean_RS = count_RN @ parts_SN.T / parts_SN.shape[1]
    if exponential:
        mean_RS = np.exp(mean_RS)
    if len(parts_SN) == 1:
        return mean_RS[:, 0]
    return (mean_RS * _draws(generator, len(parts_SN), len(count_RN))).sum(axis=1) / len(parts_SN)


def _draws(generator: np.random.Generator, size: int, resamples: int) -> NDArray[np.int64]:
    return generator.multinomial(size, np.full(size, 1 / size), size=resamples)


def _listed(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else words[0]


def _chance(probability: float) -> str:
    return "more than 0.99" if probability >= 0.995 else f"{probability:.2f}"
