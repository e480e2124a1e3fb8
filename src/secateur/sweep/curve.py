"""How far can one go? Quality over sparsity from a few full runs, interpolated; its knee, and a setting to take.

x is the sparsity, y the logarithm of a metric that should be small, or minus a metric that should be large; where a
small one reaches 0, such as a rate of errors, it is y itself. Between the points that were run, y is a monotone cubic
in x (PCHIP). The knee is where it lies furthest below the straight line from the dense model to the last point, both
axes scaled to [0, 1] (Kneedle, V. Satopaa et al., ICDCS workshops 2011): up to there a step more costs less than it
does on average, beyond it more.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from secateur.errors import UsageError
from secateur.report import Metric
from secateur.report.numbers import json_ready
from secateur.sweep.pareto import quality_metric
from secateur.sweep.records import Record
from secateur.sweep.runner import Results
from secateur.versions import library_versions, machine

STEP = 0.01
"""distance of the sparsities at which a curve is predicted, and to which a setting is rounded"""

Floats = NDArray[np.float64]


def knee_of(x: ArrayLike, y: ArrayLike) -> int:
    """The position at which y lies furthest below the line from its first to its last point, both axes in [0, 1].

    Where y falls or nothing lies below the line there is no knee before the end: the last position.
    """
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if y[-1] <= y[0]:
        return len(x) - 1
    below = (x - x[0]) / (x[-1] - x[0]) - (y - y[0]) / (y[-1] - y[0])
    best = int(below.argmax())
    return best if below[best] > 1e-9 else len(x) - 1


@dataclass(frozen=True)
class Curve:
    """One metric over sparsity: ``points`` were run, the dense model first, ``predicted`` lies between on ``grid``.

    ``knee`` and ``recommended`` are sparsities; ``prediction`` is what the points before it gave for the recommended
    one, which was then run as well.
    """

    metric: str
    higher_is_better: bool
    protocol: str
    points: Mapping[float, float]
    grid: tuple[float, ...]
    predicted: tuple[float, ...]
    knee: float
    recommended: float
    prediction: float | None = None

    @property
    def measured(self) -> float | None:
        """The metric at the recommended sparsity; None where it wasn't run."""
        return self.points.get(self.recommended)

    @property
    def dense(self) -> float:
        """The metric of the dense model."""
        return self.points[0.0]


def curve_of(results: Results, metric: str | None = None, within: float | None = None) -> Curve:
    """The curve through the points of a sweep over ``sparsity``.

    ``metric`` is by default the first that says how good a model is. The recommended sparsity is the knee, or the
    largest one at which the metric is expected to stay within a factor ``within`` of the dense model's.
    Raises UsageError when too little was measured.
    """
    dense = results.dense
    name = metric or (quality_metric(dense) if dense is not None else None)
    if dense is None or name is None or not dense.done:
        raise UsageError("a curve needs a quality of the dense model: measure a perplexity or a task")
    kind = next((m for m in dense.metrics if m.name == name), None)
    if kind is None:
        raise UsageError(f"'{name}' was not measured: " + ", ".join(m.name for m in dense.metrics))
    at = dense.metric(name)
    if at is None or not math.isfinite(at):
        raise UsageError(f"a curve needs a quality of the dense model, whose {name} is no finite number")
    points = {0.0: at}
    for record in results.points:
        value = record.metric(name)
        if value is not None and math.isfinite(value):
            points[float(record.values["sparsity"])] = value
    return through(dict(sorted(points.items())), kind, within)


def through(points: Mapping[float, float], metric: Metric, within: float | None = None) -> Curve:
    """The curve through these points, sparsity → value, the dense model's at 0 among them. Raises UsageError."""
    if len(points) < 3:
        raise UsageError("a curve needs two sparsities besides the dense model, all of which could be measured")
    higher = bool(metric.higher_is_better)
    x = np.array(list(points))
    scale = _scale(points, higher)
    y = np.array([scale.to(value) for value in points.values()])
    # whole numbers of steps, so that 0.3 is the 0.3 of the user
    grid = np.unique(np.append(np.arange(0, round(x[-1] / STEP) + 1) * STEP, x).round(6))
    grid = grid[grid <= x[-1] + 1e-9]
    from scipy.interpolate import PchipInterpolator

    smooth = PchipInterpolator(x, y)(grid)
    knee = float(grid[knee_of(grid, smooth)])
    recommended = knee
    if within is not None:
        good = smooth <= scale.to(_worse(points[0.0], within, higher)) + 1e-12
        # the first that is too bad ends it
        last = int(np.argmin(good)) - 1 if not good.all() else len(grid) - 1
        recommended = float(grid[max(last, 0)])
    values = [scale.back(float(value)) for value in smooth]
    at = tuple(float(value) for value in grid)
    return Curve(metric.name, higher, metric.protocol, dict(points), at, tuple(values), knee, recommended)


def predicted_at(curve: Curve, sparsity: float) -> float:
    """What the curve expects at a sparsity of its grid."""
    return curve.predicted[curve.grid.index(sparsity)]


class _Scale(NamedTuple):
    """From a metric to the y of its curve, which is smaller where the metric is better, and back."""

    to: Callable[[float], float]
    back: Callable[[float], float]


def _scale(points: Mapping[float, float], higher: bool) -> _Scale:
    if higher:
        return _Scale(operator.neg, operator.neg)
    return _Scale(math.log, math.exp) if min(points.values()) > 0 else _Scale(operator.pos, operator.pos)


def _worse(dense: float, within: float, higher: bool) -> float:
    """What is a factor ``within`` worse than the dense model's."""
    # of a metric below zero, such as a log-likelihood, the larger multiple is the smaller number
    return dense / within if higher == (dense > 0) else dense * within


def curve_document(curves: Sequence[Curve], results: Results) -> dict[str, Any]:
    """Everything as JSON-ready values; the first curve is the one that the recommendation comes from."""
    base = results.sweep.base
    step = base.steps[0]
    return json_ready(
        {
            "model": base.model,
            "method": step.method,
            "options": step.options,
            "allocate": step.allocate,
            "calibration": base.calibration.model_dump(),
            "recommended": {
                "sparsity": curves[0].recommended,
                "predicted": curves[0].prediction,
                "measured": curves[0].measured,
            },
            "curves": [
                {
                    "metric": curve.metric,
                    "protocol": curve.protocol,
                    "higher_is_better": curve.higher_is_better,
                    "knee": curve.knee,
                    "points": [{"sparsity": x, "value": y} for x, y in curve.points.items()],
                    "predicted": [
                        {"sparsity": x, "value": y} for x, y in zip(curve.grid, curve.predicted, strict=True)
                    ],
                }
                for curve in curves
            ],
            "failed": {record.name: record.error for record in results.failed},
            "seconds": {record.name: record.seconds for record in results.points},
            "versions": library_versions(),
            "machine": machine(),
        }
    )


def quality_metrics(record: Record) -> list[str]:
    """Names of all metrics of a record that say how good a model is, the first of them first."""
    first = quality_metric(record)
    tasks = [m.name for m in record.metrics if m.higher_is_better is not None and ":" in m.name]
    return list(dict.fromkeys([first, *tasks])) if first else []
