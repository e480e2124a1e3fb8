"""What a sweep leaves: ``results.json``, ``results.csv``, ``sweep.html``, and the table on the terminal."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.report.folder import write_study
from secateur.report.numbers import MISSING, format_value, json_ready, percent
from secateur.sweep.pareto import COSTS, Front, fronts, qualities
from secateur.sweep.records import DENSE, Record
from secateur.sweep.runner import Results
from secateur.versions import library_versions, machine

if TYPE_CHECKING:
    from rich.table import Table

BEST = "●"
"""stands in the table at points that are on a front"""


def write_results(results: Results, folder: Path) -> list[str]:
    """Write the three files, each whole or not at all; returns notes on what is missing. Raises OutputError."""

    def render() -> str:
        from secateur.sweep import page

        return page.render(results)

    return write_study(
        folder, "results.json", results_document(results), "sweep.html", render, csv=results_csv(results)
    )


def results_document(results: Results) -> dict[str, Any]:
    """Everything as JSON-ready values: the recipe, the dense model, the points, the fronts by cost."""
    sweep = results.sweep
    return json_ready(
        {
            "model": sweep.base.model,
            "recipe": dict(sweep.data),
            "axes": sweep.axes,
            "dense": _entry(results.dense) if results.dense else None,
            "points": [_entry(record) for record in results.points],
            "failed": [record.name for record in results.failed],
            "reused": results.reused,
            "pareto": {
                front.cost.name: {"quality": front.quality, "unit": front.cost.unit, "points": list(front.best)}
                for front in fronts(results.dense, results.points)
            },
            "notes": results.notes,
            "versions": library_versions(),
            "machine": machine(),
        }
    )


def _entry(record: Record) -> dict[str, Any]:
    costs = {f"{cost.name} ({cost.unit})": cost.of(record) for cost in COSTS if cost.unit == "ms/token"}
    numbers = {metric.name: record.metric(metric.name) for metric in record.metrics}
    plan = None if record.name == DENSE or not record.done else f"plans/{record.name}"
    return {
        "point": record.name,
        "values": dict(record.values),
        "status": "done" if record.done else "failed",
        "error": record.error,
        "removed": record.removed,
        "metrics": {**numbers, **{name: value for name, value in costs.items() if value is not None}},
        "protocols": {metric.name: metric.protocol for metric in record.metrics},
        "plan": plan,
        "attempts": record.attempts,
        "seconds": record.seconds,
        "worker": record.worker,
        "notes": list(record.notes),
    }


def results_csv(results: Results) -> str:
    """One line per point, the dense model first, in plain numbers; what is missing stays empty."""
    entries = results_document(results)
    rows = [entries["dense"]] if entries["dense"] else []
    rows += entries["points"]
    metrics = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["point", *entries["axes"], "status", "removed", *metrics, "attempts", "seconds", "error"])
    for row in rows:
        values = [row["values"].get(axis, "") for axis in entries["axes"]]
        numbers = ["" if (value := row["metrics"].get(name)) is None else value for name in metrics]
        removed = "" if row["removed"] is None else row["removed"]
        writer.writerow(
            [row["point"], *values, row["status"], removed, *numbers, row["attempts"], row["seconds"], row["error"]]
        )
    return text.getvalue()


def columns(results: Results) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table that people see: axes, what is gone, quality, costs, and whether it is on a front.

    Axes and costs in which no two points differ are left out; a failed point says so.
    """
    found = fronts(results.dense, results.points)
    records = ([results.dense] if results.dense else []) + results.points
    measured = list(qualities(records))
    axes = [axis for axis in results.sweep.axes if len({str(r.values.get(axis)) for r in results.points}) > 1]
    axes = axes or results.sweep.axes
    # parameters that are there and zero cost nothing that the table can show
    shown = [front for front in found if front.cost.name != "parameters"]
    header = [*axes, "removed", *short_metrics(measured), *(front.cost.short for front in shown), "best"]
    best = {name for front in found for name in front.best}
    return header, [
        [*_labels(record, axes), *_numbers(record, measured, shown), BEST if record.name in best else ""]
        for record in records
    ]


def short_metrics(names: Sequence[str]) -> list[str]:
    """Without their data, where that leaves them different."""
    kinds = [name.partition(":")[0] for name in names]
    return [kind if kinds.count(kind) == 1 else name for kind, name in zip(kinds, names, strict=True)]


def _labels(record: Record, axes: Sequence[str]) -> list[str]:
    if record.name == DENSE:
        return [DENSE, *[""] * (len(axes) - 1)]
    return [str(record.values.get(axis, MISSING)) for axis in axes]


def _numbers(record: Record, measured: Sequence[str], shown: Sequence[Front]) -> list[str]:
    if not record.done:
        return ["failed", *[MISSING] * (len(measured) + len(shown))]
    numbers = [_value(record.metric(name), "") for name in measured]
    # a unit that the head of the column says is left out
    costs = [_value(f.cost.of(record), "" if f.cost.unit == "ms/token" else f.cost.unit) for f in shown]
    return [percent(record.removed or 0.0), *numbers, *costs]


def _value(value: float | None, unit: str) -> str:
    return MISSING if value is None else format_value(value, unit)


def results_table(results: Results) -> Table:
    """The same as a table for the terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    header, rows = columns(results)
    table = Table(
        box=SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
        padding=(0, 1),
        collapse_padding=True,
        header_style="bold",
        caption_justify="left",
    )
    first_number = header.index("removed")
    for position, name in enumerate(header):
        number = first_number <= position < len(header) - 1
        # a head may be broken to make room, a value is not
        least = max((len(row[position]) for row in rows), default=0)
        # a mark needs no head; the caption explains it
        head = name if position < len(header) - 1 else ""
        table.add_column(Text(head), justify="right" if number else "left", overflow="fold", min_width=least)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    if any(row[-1] for row in rows):
        table.caption = Text(f"\n{BEST} no other point is as good and as small (or as fast)")
    return table
