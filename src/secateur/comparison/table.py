"""The table of a comparison: the dense model, then every method at every budget."""

from __future__ import annotations

from secateur.comparison.rows import Comparison, Row
from secateur.report.numbers import MISSING, format_bytes, format_count, format_value, percent
from secateur.sweep.pareto import REQUEST
from secateur.sweep.records import DENSE, Record
from secateur.sweep.results import short_metrics

SHARED = "*"
"""stands behind times that would be longer without statistics that another point had taken"""
CAPTION = (
    "removed: of the linear weights of the blocks; s and memory: of planning and cutting, in the process that also "
    f"holds the dense model; {SHARED} with statistics that were there already; ±: standard deviation over seeds; "
    "≈ best: not distinguishable"
)
TRAINED_CAPTION = "; untrained: what the first number was before the training, which s and memory are of as well"


def columns(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Header and rows."""
    names = list(comparison.metrics)
    timed = any(row.mean(REQUEST) is not None for row in comparison.rows)
    trained = comparison.trained
    header = ["sparsity", "method", "verdict", *short_metrics(names)]
    header[4:4] = ["untrained"] if trained else []
    header += ["removed", "params", "MACs", *(["ms/request"] if timed else []), "s", "memory"]
    cells = [_dense(comparison.dense, names, trained, timed)] if comparison.dense else []
    shown = None
    for row in comparison.rows:
        label = "" if row.sparsity == shown else f"{row.sparsity:g}"
        shown = row.sparsity
        numbers = _row(row, names, trained, comparison.dense if timed else None)
        cells.append([label, row.method, mark(comparison, row), *numbers])
    return header, cells


def width_of(header: list[str], rows: list[list[str]]) -> int:
    """Characters that the table takes when no cell is broken."""
    return sum(2 + max(len(cell) for cell in column) for column in zip(header, *rows, strict=True))


def mark(comparison: Comparison, row: Row) -> str:
    """What the verdict by the first metric says of a row."""
    if not row.done:
        return "failed"
    if not row.meets_budget:
        return "off budget"
    verdict = next((v for v in comparison.first_verdicts if v.sparsity == row.sparsity), None)
    if verdict is None or row.method not in (verdict.best, *verdict.rivals):
        return ""
    if verdict.rivals:
        return "≈ best"
    return "best"


def caption(comparison: Comparison) -> str:
    """What stands below the table."""
    return CAPTION + (TRAINED_CAPTION if comparison.trained else "")


def _dense(dense: Record, names: list[str], trained: bool, timed: bool) -> list[str]:
    def cell(name: str) -> str:
        value = dense.metric(name)
        return MISSING if value is None else format_value(value)

    sizes = [_count(dense.metric("parameters")), _count(dense.metric("MACs"))]
    latency = [cell(REQUEST)] if timed else []
    metrics = [cell(name) for name in names]
    metrics[1:1] = [MISSING] if trained else []
    return ["", DENSE, "", *metrics, percent(0.0), *sizes, *latency, MISSING, MISSING]


def _row(row: Row, names: list[str], trained: bool, timed_with: Record | None) -> list[str]:
    removed = MISSING if row.removed is None else percent(row.removed)
    sizes = [_count(row.mean("parameters")), _count(row.mean("MACs"))]
    seconds = MISSING if row.seconds is None else format_value(row.seconds) + (SHARED if row.shared else "")
    memory = MISSING if row.peak_bytes is None else format_bytes(row.peak_bytes)
    latency = [] if timed_with is None else [_latency(row, timed_with)]
    metrics = [_spread(row, name) for name in names]
    metrics[1:1] = [_spread(row, names[0], untrained=True)] if trained else []
    return [*metrics, removed, *sizes, *latency, seconds, memory]


def _latency(row: Row, dense: Record) -> str:
    milliseconds, base = row.request_ms(dense), dense.metric(REQUEST)
    if milliseconds is None or not base:
        return MISSING
    return f"{format_value(milliseconds)} (×{base / milliseconds:.2f})"


def _spread(row: Row, name: str, *, untrained: bool = False) -> str:
    mean, spread = row.mean(name, untrained=untrained), row.spread(name, untrained=untrained)
    if mean is None:
        return MISSING
    return format_value(mean) if spread is None else f"{format_value(mean)} ± {format_value(spread)}"


def _count(value: float | None) -> str:
    return MISSING if value is None else format_count(value)
