"""Which points are worth having: quality against what a model costs, and the front that no other point beats."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from secateur.report.report import BYTES_ON_DISK, DECODE, DECODE_BOUND, DECODE_PRODUCTS
from secateur.sweep.records import Record

SIZES = ("parameters", "non-zero parameters", "bytes", BYTES_ON_DISK, "peak memory", "MACs")
REQUEST = "latency of a request"
SPEEDS = ("prefill", DECODE, DECODE_PRODUCTS, DECODE_BOUND, REQUEST)


@dataclass(frozen=True)
class Cost:
    """Something that a smaller model has less of. ``of`` gives it for a record, or None where it wasn't measured.

    ``short`` is the head of its column in a table.
    """

    name: str
    unit: str
    short: str
    of: Callable[[Record], float | None]


def _latency(record: Record) -> float | None:
    rate = record.metric(DECODE)
    return 1000.0 / rate if rate else None


COSTS = (
    Cost("latency", "ms/token", "ms/tok", _latency),
    Cost(REQUEST, "ms", "request", lambda record: record.metric(REQUEST)),
    Cost(BYTES_ON_DISK, "bytes", "on disk", lambda record: record.metric(BYTES_ON_DISK)),
    Cost("parameters", "parameters", "params", lambda record: record.metric("parameters")),
    Cost("non-zero parameters", "parameters", "nonzero", lambda record: record.metric("non-zero parameters")),
)


@dataclass(frozen=True)
class Front:
    """One cost against the quality: what every record has, and the names that no other record beats, cheapest first."""

    cost: Cost
    quality: str
    higher_is_better: bool
    places: Mapping[str, tuple[float, float]]
    """name → (cost, quality)"""
    best: tuple[str, ...]


def quality_metric(record: Record) -> str | None:
    """The first metric that says how good a model is; None when only sizes and speeds were measured."""
    return next(iter(qualities([record])), None)


def qualities(records: Sequence[Record]) -> dict[str, bool]:
    """All metrics that say how good a model is, in the order of measuring, and whether higher is better."""
    names: dict[str, bool] = {}
    for metric in (m for record in records for m in record.metrics):
        if metric.higher_is_better is not None and metric.name not in (*SIZES, *SPEEDS):
            names.setdefault(metric.name, metric.higher_is_better)
    return names


def fronts(dense: Record | None, points: Sequence[Record]) -> list[Front]:
    """A front for every cost in which the records differ; none without a quality."""
    records = [record for record in ([dense] if dense else []) + list(points) if record.done]
    quality = next(filter(None, map(quality_metric, records)), None)
    if quality is None:
        return []
    higher = next(bool(m.higher_is_better) for record in records for m in record.metrics if m.name == quality)
    found = []
    for cost in COSTS:
        places = {}
        for record in records:
            price, value = cost.of(record), record.metric(quality)
            if price is not None and value is not None:
                places[record.name] = (price, value)
        if len({price for price, _ in places.values()}) > 1:
            found.append(Front(cost, quality, higher, places, tuple(undominated(places, higher))))
    return found


def undominated(places: Mapping[str, tuple[float, float]], higher_is_better: bool) -> list[str]:
    """Names of (cost, quality) pairs that no other pair beats in one without losing in the other, cheapest first."""
    sign = -1.0 if higher_is_better else 1.0
    both = {name: (cost, sign * quality) for name, (cost, quality) in places.items()}

    def beaten(mine: tuple[float, float]) -> bool:
        return any(other != mine and other[0] <= mine[0] and other[1] <= mine[1] for other in both.values())

    return sorted((name for name, pair in both.items() if not beaten(pair)), key=lambda name: both[name])
