"""Which point comes next: the rest of a grid, or what Optuna asks for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any, Protocol

from secateur.errors import UsageError, nearest, require_extra
from secateur.sweep.axes import Choice, Point, Range, Scalar, rounded
from secateur.sweep.pareto import quality_metric
from secateur.sweep.records import Record
from secateur.sweep.spec import Search, Sweep

Finished = Mapping[str, Record]
"""records of points that are done, by key"""


class Source(Protocol):
    """Gives points until there are no more, and is told how each went."""

    def take(self, may_start: Callable[[Point], bool]) -> Point | None:
        """A point that may start now; None when there is none, which another result may change."""
        ...

    def tell(self, point: Point, record: Record) -> None:
        """The outcome of a point that was taken."""
        ...


class Grid:
    """The points of a grid that aren't done yet, in their order, those first that needn't wait for another."""

    def __init__(self, sweep: Sweep, finished: Finished) -> None:
        self._left = [point for point in sweep.points if point.key not in finished]

    def take(self, may_start: Callable[[Point], bool]) -> Point | None:
        point = next(filter(may_start, self._left), None)
        if point is not None:
            self._left.remove(point)
        return point

    def tell(self, point: Point, record: Record) -> None:
        return None


class OptunaSearch:
    """Trials of an Optuna study; those of an earlier, interrupted run count, and teach the sampler.

    ``dense`` is asked for the direction of every objective. Raises MissingExtraError without Optuna, and UsageError
    for an objective that is not measured.
    """

    def __init__(self, sweep: Sweep, finished: Finished, dense: Record) -> None:
        assert sweep.search is not None
        self._optuna: Any = require_extra("optuna", "sweep", "a search")
        self._optuna.logging.set_verbosity(self._optuna.logging.ERROR)
        self._sweep, self._finished = sweep, dict(finished)
        self._objectives = objectives(sweep.search, dense)
        self._distributions = {axis: self._distribution(domain) for axis, domain in sweep.space.items()}
        known = self._known_trials()[: sweep.search.trials]
        self._study = self._optuna.create_study(
            directions=[direction for _, direction in self._objectives],
            # a sampler of the same seed would ask for the known ones again
            sampler=self._optuna.samplers.TPESampler(seed=sweep.search.sampler_seed + len(known)),
        )
        self._study.add_trials(known)
        self._left = sweep.search.trials - len(known)
        self._running: dict[str, list[Any]] = {}
        self._held: Point | None = None

    def take(self, may_start: Callable[[Point], bool]) -> Point | None:
        point, self._held = self._held, None
        point = point or next(self._new_points(), None)
        if point is None or may_start(point):
            return point
        self._held = point
        return None

    def tell(self, point: Point, record: Record) -> None:
        if record.done:
            self._finished[point.key] = record
        for trial in self._running.pop(point.key):
            self._finish(trial, record)

    def _new_points(self) -> Iterator[Point]:
        while self._left > 0:
            self._left -= 1
            trial = self._study.ask(self._distributions)
            point = self._sweep.point({axis: rounded(value) for axis, value in trial.params.items()})
            if point.key in self._finished:
                self._finish(trial, self._finished[point.key])
            elif point.key in self._running:
                self._running[point.key].append(trial)
            else:
                self._running[point.key] = [trial]
                yield point

    def _finish(self, trial: Any, record: Record) -> None:
        values = self._values(record)
        if values is None:
            self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
        else:
            self._study.tell(trial, values)

    def _values(self, record: Record) -> list[float] | None:
        values = [record.metric(name) for name, _ in self._objectives]
        return None if None in values else [value for value in values if value is not None]

    def _known_trials(self) -> list[Any]:
        """What was done before, as far as it lies in the space of now."""
        trials = []
        for record in self._finished.values():
            values = self._values(record)
            # the steps of a range may have changed since
            with suppress(ValueError):
                trials += [] if values is None else [self._trial(dict(record.values), values)]
        return trials

    def _trial(self, params: dict[str, Scalar], values: list[float]) -> Any:
        return self._optuna.trial.create_trial(params=params, distributions=self._distributions, values=values)

    def _distribution(self, domain: Choice | Range) -> Any:
        kinds = self._optuna.distributions
        if isinstance(domain, Choice):
            return kinds.CategoricalDistribution(domain.values)
        kind = kinds.IntDistribution if domain.whole else kinds.FloatDistribution
        step = domain.step if domain.step is not None or not domain.whole else 1
        return kind(domain.low, domain.high, log=domain.log, step=step)


def objectives(search: Search, dense: Record) -> list[tuple[str, str]]:
    """(metric, ``minimize`` or ``maximize``) for every objective. Raises UsageError for one that is not measured."""
    names = search.objective or [quality_metric(dense) or ""]
    by_name = {metric.name: metric for metric in dense.metrics}
    found = []
    for name in names:
        if name not in by_name:
            hint = nearest(name, by_name) or "; measured are " + ", ".join(by_name)
            raise UsageError(f"objective '{name}' is not among what 'evaluate' measures{hint}")
        found.append((name, "maximize" if by_name[name].higher_is_better else "minimize"))
    return found


def statistics_of(point: Point) -> set[str]:
    """What a point needs of the dense model's statistics or scores, which are kept under such a name; empty: nothing.

    A sequential method takes its statistics from a model that is cut already, which no other point has; an allocator
    takes them from the dense one.
    """
    from secateur.observe.store import kind_of

    words = [word for word in point.recipe.words(point.recipe.steps[0]) if word is not None]
    observers = [word for word in words if word.observed_statistics() and not word.in_sequence]
    calibration = point.recipe.calibration
    text = calibration.model_dump(exclude=set() if calibration.drawn else {"seed"})
    names = {kind_of(observer): sorted(observer.observed_statistics()) for observer in observers}
    method, _ = point.recipe.words(point.recipe.steps[0])
    if method.kept_scores:
        names["scores"] = [method.kept_scores]
    return {json.dumps([kind, needed, text, point.recipe.dtype]) for kind, needed in names.items()}
