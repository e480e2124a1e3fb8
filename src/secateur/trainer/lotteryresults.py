"""What a lottery leaves: ``results.json``, ``results.csv``, ``lottery.html`` with the picture, and a table."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from secateur.report.charts import INK, Chart, axis, frame
from secateur.report.folder import write_study
from secateur.report.looks import LOOKS_STYLE, Look, key_of, looks_of
from secateur.report.numbers import MISSING, format_count, format_value, json_ready
from secateur.report.page import facts_table, figure, page, table
from secateur.report.training import flat
from secateur.rounds import Row, rows_of
from secateur.trainer.lottery import TICKET, Tickets
from secateur.versions import library_versions, machine

_UNITS = {"accuracy": "fraction"}
DENSE = "dense"


def write_results(found: Tickets, folder: Path) -> list[str]:
    """Write the three files, each whole or not at all; returns notes on what is missing. Raises OutputError."""
    return write_study(
        folder, "results.json", document(found), "lottery.html", lambda: render(found), csv=as_csv(found)
    )


def document(found: Tickets) -> dict[str, Any]:
    """Everything as JSON-ready values: the recipe, every training, and means and spreads by level and branch."""
    return json_ready(
        {
            "recipe": found.recipe.model_dump(mode="json", exclude_none=True),
            "trainings": [{**dataclasses.asdict(entry), "remaining": entry.remaining} for entry in found.entries],
            "rows": {
                metric: [
                    {**dataclasses.asdict(row), "mean": row.mean, "spread": row.spread}
                    for row in rows_of(found.entries, metric)
                ]
                for metric in (found.quality, "step of the lowest loss")
            }
            if found.entries
            else {},
            "failed": found.failed,
            "reused": found.reused,
            "notes": found.notes,
            "versions": library_versions(),
            "machine": machine(),
        }
    )


def as_csv(found: Tickets) -> str:
    """One line per training, in plain numbers."""
    metrics = list(dict.fromkeys(name for entry in found.entries for name in entry.metrics))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["seed", "level", "branch", "remaining", "weights", *metrics, "pq_index"])
    for entry in found.entries:
        numbers = [entry.metrics.get(name, "") for name in metrics]
        writer.writerow(
            [entry.seed, entry.level, entry.branch, entry.remaining, entry.weights, *numbers, entry.pq_index]
        )
    return text.getvalue()


def columns(found: Tickets) -> tuple[list[str], list[list[str]]]:
    """Header and rows: the number that counts, mean ± spread over seeds, by level and branch."""
    rows = rows_of(found.entries, found.quality)
    branches = list(dict.fromkeys(row.branch for row in rows))
    header = ["level", "remaining", "weights", *branches]
    several = len(found.recipe.lottery.seeds) > 1
    by_place = {(row.level, row.branch): row for row in rows}
    weights = {entry.level: entry.weights for entry in found.entries}
    return header, [
        [
            str(level),
            format_value(by_place[level, TICKET].remaining, "fraction"),
            format_count(weights[level]),
            *(_said(by_place.get((level, branch)), found.quality, several) for branch in branches),
        ]
        for level in sorted({row.level for row in rows if row.branch == TICKET})
    ]


def _said(row: Row | None, quality: str, several: bool) -> str:
    if row is None:
        return MISSING
    unit = _UNITS.get(quality, "")
    if not several:
        return format_value(row.mean, unit)
    return f"{format_value(row.mean, unit)} ± {format_value(row.spread, unit)}"


def render(found: Tickets) -> str:
    """The lottery as one HTML document that holds all it shows. Raises MissingExtraError without plotly."""
    charts: dict[str, Any] = {}
    sections = [_headline(found)]
    if found.entries:
        rows = rows_of(found.entries, found.quality)
        looks = looks_of(dict.fromkeys(row.branch for row in rows))
        key = key_of(looks)
        steps = rows_of(found.entries, "step of the lowest loss")
        index = rows_of([dataclasses.replace(e, metrics={"PQ index": e.pq_index}) for e in found.entries], "PQ index")
        sections += [
            "<section><h2>Tickets against controls</h2>",
            figure(curve_chart(rows, looks, found.quality, _UNITS.get(found.quality, "")), charts, key),
            figure(curve_chart(steps, looks, "step of the lowest loss"), charts, key),
            figure(curve_chart(index, looks, "PQ index"), charts, key),
            table(*columns(found)),
            "</section>",
        ]
    sections.append(_provenance(found))
    return page(f"Lottery of {found.recipe.model.name}", sections, charts, "the page of a lottery", LOOKS_STYLE)


def _headline(found: Tickets) -> str:
    spec = found.recipe.lottery
    failed = "".join(f"<li>{escape(name)}: {escape(error)}</li>" for name, error in found.failed.items())
    warning = f'<div class="box warning" role="note"><p>Failed:</p><ul>{failed}</ul></div>' if failed else ""
    return (
        '<header><p class="kicker">Lottery tickets</p>'
        f"<h1>{escape(found.recipe.model.name)}</h1>"
        f'<p class="lede"><strong>{escape(spec.method)}</strong>: {spec.levels} levels, seeds'
        f" {', '.join(map(str, spec.seeds))}; {len(found.entries)} trainings.</p>{warning}</header>"
    )


def curve_chart(rows: Sequence[Row], looks: Mapping[str, Look], metric: str, unit: str = "") -> Chart:
    """One metric against the weights that remain, a line per branch with its spread, the dense network as a level."""
    data: list[dict[str, Any]] = []
    dense = next((row for row in rows if row.level == 0), None)
    least = min(row.remaining for row in rows)
    if dense is not None:
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "x": [1.0, least],
                "y": [dense.mean] * 2,
                "line": {"width": 1, "color": INK, "dash": "dot"},
                "hovertemplate": f"{DENSE}: %{{y:.4g}}<extra></extra>",
            }
        )
    for branch, look in looks.items():
        own = [row for row in rows if row.branch == branch]
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "x": [row.remaining for row in own],
                "y": [row.mean for row in own],
                "error_y": {
                    "type": "data",
                    "array": [row.spread for row in own],
                    "thickness": 1,
                    "width": 3,
                    "color": look.colour,
                },
                "line": {"width": 2, "color": look.colour},
                "marker": {"size": 8, "symbol": look.symbol, "color": look.colour},
                "hovertemplate": f"{escape(branch)}, %{{x:.1%}} left: %{{y:.4g}}<extra></extra>",
            }
        )
    # from the dense network on the left to the sparsest on the right, as in the papers
    x = axis("weights that remain", zeroline=False, tickformat=".2~%", type="log", autorange="reversed", nticks=8)
    y = axis(escape(metric), zeroline=False, nticks=6, **({"tickformat": ".0%"} if unit == "fraction" else {}))
    seeds = len(rows[0].values)
    spread = f"means over {seeds} seeds with their standard deviation" if seeds > 1 else "one seed"
    said = f"{metric[0].upper() + metric[1:]} against the weights that remain; {spread}; dotted: the dense network."
    title = f"{metric[0].upper() + metric[1:]} against remaining weights"
    return Chart(title, said, {"data": data, "layout": frame(340, x, y)}, has_key=False)


def _provenance(found: Tickets) -> str:
    notes = "".join(f"<li>{escape(note)}</li>" for note in found.notes)
    recipe = dict(flat(found.recipe.model_dump(mode="json", exclude_none=True, exclude={"out"})))
    blocks = (("The recipe", recipe), ("Machine", machine()), ("Versions", library_versions()))
    parts = [f"<h3>{title}</h3>{facts_table(facts)}" for title, facts in blocks]
    return (
        "<section><h2>How it was made</h2>"
        + (f'<h3>On the way</h3><ul class="notes">{notes}</ul>' if notes else "")
        + "".join(parts)
        + "</section><footer class='muted'>secateur</footer>"
    )
