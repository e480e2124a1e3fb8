"""Which method is best at a budget, and how sure that is.

Methods are measured on the same windows, or the same items, so that their differences are paired. Two things are
resampled, one inside the other:

- Windows are drawn anew, with replacement and the same ones for all methods (the paired bootstrap of P. Koehn,
  "Statistical Significance Tests for Machine Translation Evaluation", EMNLP 2004).
- Seeds stand for draws of the calibration text and of what a method draws itself. They are few, and drawing two or
  three of them with replacement would find a difference where they only agree by chance. So the mean over S seeds is
  shifted by s / sqrt(S) times a draw of Student's t with S - 1 degrees of freedom, s being their standard deviation.
  Two methods with as many seeds are paired by seed, since they saw the same calibration text. Perplexities are shifted
  in their logarithms: of a method that is at times a hundred times as bad the perplexities themselves are too skewed.

The fraction of draws in which one method is better than another is the probability that is reported; a draw without a
difference counts half. A draw is judged by what methods are ranked by: the mean over seeds of the metric, which for a
perplexity is not the metric of the mean loss. With one seed the probability covers the windows alone. It holds for this
text, and not for other texts or tasks.
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

    Both are [seeds, windows] of the same windows. As many seeds on both sides are taken to be the same ones, in the
    same order; the numbers may differ. ``exponential`` takes the mean over seeds of the exponential of every seed's
    mean. Draws without a difference count half. The draws are those of ``seed``.
    """
    first_SN, second_SN = (np.atleast_2d(np.asarray(one, dtype=np.float64)) for one in (first, second))
    generator = np.random.default_rng(seed)
    count_RN = _draws(generator, first_SN.shape[1], resamples)
    first_RS, second_RS = (count_RN @ one.T / one.shape[1] for one in (first_SN, second_SN))
    difference_R = _over_seeds(first_RS, exponential) - _over_seeds(second_RS, exponential)
    if len(first_SN) == len(second_SN):
        difference_R += _errors(first_RS - second_RS, generator)
    else:
        difference_R += _errors(first_RS, generator) - _errors(second_RS, generator)
    better_R = difference_R > 0 if higher_is_better else difference_R < 0
    return float(better_R.mean() + 0.5 * (difference_R == 0).mean())


def _over_seeds(value_RS: NDArray[np.float64], exponential: bool) -> NDArray[np.float64]:
    """What every draw is ranked by, [draws]: the mean over seeds, or the logarithm of the mean exponential."""
    if not exponential:
        return value_RS.mean(axis=1)
    largest_R = value_RS.max(axis=1)
    return largest_R + np.log(np.exp(value_RS - largest_R[:, None]).mean(axis=1))


def _errors(value_RS: NDArray[np.float64], generator: np.random.Generator) -> NDArray[np.float64]:
    """How far off the mean of so few seeds may be, drawn anew for every draw: [draws], 0 of a single seed."""
    draws, seeds = value_RS.shape
    if seeds == 1:
        return np.zeros(draws)
    return value_RS.std(axis=1, ddof=1) / seeds**0.5 * generator.standard_t(seeds - 1, size=draws)


def _draws(generator: np.random.Generator, size: int, resamples: int) -> NDArray[np.int64]:
    return generator.multinomial(size, np.full(size, 1 / size), size=resamples)


def _listed(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else words[0]


def _chance(probability: float) -> str:
    return "more than 0.99" if probability >= 0.995 else f"{probability:.2f}"
