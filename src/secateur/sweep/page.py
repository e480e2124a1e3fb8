"""``sweep.html``: one chart per cost with its Pareto front, and all points in numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from secateur.report.charts import INK, MUTED, Chart, axis, frame
from secateur.report.looks import LOOKS_STYLE, key_of, looks_of
from secateur.report.numbers import format_value
from secateur.report.page import facts_table, figure, page, table
from secateur.sweep.pareto import Front, fronts
from secateur.sweep.records import DENSE, Record
from secateur.sweep.results import columns
from secateur.sweep.runner import Results
from secateur.versions import library_versions, machine

_WIDE_RANGE = 8.0
"""qualities that span more than this factor get a logarithmic axis"""

_MOST_NAMED = 6
"""points of a front that are named in its description"""


def render(results: Results) -> str:
    """The sweep as one HTML document that holds all it shows. Raises MissingExtraError without plotly."""
    charts: dict[str, Any] = {}
    found = fronts(results.dense, results.points)
    sections = [_headline(results), _fronts(found, results, charts), _points(results), _provenance(results)]
    return page(f"Sweep of {results.sweep.base.model}", sections, charts, "the page of a sweep", LOOKS_STYLE)


def _headline(results: Results) -> str:
    done = sum(record.done for record in results.points)
    failed = "".join(
        f"<li>{escape(record.name)}: {escape(record.error)} ({record.attempts} attempts)</li>"
        for record in results.failed
    )
    warning = f'<div class="box warning" role="note"><p>Failed:</p><ul>{failed}</ul></div>' if failed else ""
    return (
        '<header><p class="kicker">Pruning sweep</p>'
        f"<h1>{escape(str(results.sweep.base.model))}</h1>"
        f'<p class="lede">{done} of {results.sweep.size} points, over {escape(", ".join(results.sweep.axes))}.</p>'
        f"{warning}</header>"
    )


def _fronts(found: Sequence[Front], results: Results, charts: dict[str, Any]) -> str:
    if not found:
        why = "the points differ in no cost, or no quality was measured"
        return f"<section><h2>Pareto front</h2><p>There is none: {why}.</p></section>"
    groups = _groups(results.points)
    key = f"{key_of(looks_of(groups))}<li><b>✕</b>{DENSE}</li>"
    figures = [figure(front_chart(front, groups, results), charts, key) for front in found]
    return "\n".join(["<section><h2>Pareto front</h2>", *figures, "</section>"])


def _groups(points: Sequence[Record]) -> dict[str, list[Record]]:
    """Points by what gives them their colour: the method, as far as it varies."""
    groups: dict[str, list[Record]] = {}
    for record in points:
        groups.setdefault(str(record.values.get("method", "points")), []).append(record)
    return groups


def front_chart(front: Front, groups: Mapping[str, Sequence[Record]], results: Results) -> Chart:
    """Quality over one cost: every point, the dense model, and the staircase that no point lies beyond."""
    steps = [front.places[name] for name in front.best]
    data: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "lines",
            "x": [cost for cost, _ in steps],
            "y": [quality for _, quality in steps],
            "line": {"shape": "hv", "width": 1.5, "color": MUTED, "dash": "dot"},
            "hoverinfo": "skip",
        }
    ]
    for name, look in looks_of(groups).items():
        placed = [record.name for record in groups[name] if record.name in front.places]
        data.append(_marks(placed, front, look.symbol, look.colour))
    if DENSE in front.places:
        data.append(_marks([DENSE], front, "x", INK))
    qualities = [quality for _, quality in front.places.values()]
    wide = min(qualities) > 0 and max(qualities) / min(qualities) > _WIDE_RANGE
    y = axis(escape(front.quality), zeroline=False) | ({"type": "log", "nticks": 6} if wide else {"nticks": 6})
    x = axis(f"{front.cost.name}{_unit(front)}", zeroline=False, tickformat="~s", nticks=6)
    better = "higher" if front.higher_is_better else "lower"
    named = f": {', '.join(front.best)}" if len(front.best) <= _MOST_NAMED else ""
    description = (
        f"Left is cheaper, {better} is better{' (logarithmic scale)' if wide else ''}; {len(front.best)} of "
        f"{len(front.places)} lie on the front{named}."
    )
    layout = frame(340, x, y) | {"hovermode": "closest"}
    title = f"{front.quality} against {front.cost.name}"
    return Chart(title, description, {"data": data, "layout": layout}, has_key=False)


def _marks(names: Sequence[str], front: Front, symbol: str, colour: str) -> dict[str, Any]:
    places = [front.places[name] for name in names]
    best = set(front.best)
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [cost for cost, _ in places],
        "y": [quality for _, quality in places],
        "text": [
            f"{escape(name)}<br>{escape(front.quality)} {format_value(quality)}<br>"
            f"{front.cost.name} {format_value(cost, front.cost.unit)}"
            for name, (cost, quality) in zip(names, places, strict=True)
        ],
        "hovertemplate": "%{text}<extra></extra>",
        "marker": {
            "symbol": symbol,
            "color": colour,
            "size": [11 if name in best else 7 for name in names],
            # several sizes would otherwise make plotly draw them see-through
            "opacity": 1,
            "line": {"width": 0},
        },
    }


def _unit(front: Front) -> str:
    return {"bytes": " (bytes)", "ms/token": " (ms per token)"}.get(front.cost.unit, "")


def _points(results: Results) -> str:
    header, rows = columns(results)
    return f"<section><h2>All points</h2>{table(header, rows)}</section>"


def _provenance(results: Results) -> str:
    records = [record for record in ([results.dense] if results.dense else []) + results.points if record.done]
    protocols = dict.fromkeys(f"{m.name}: {m.protocol}" for r in records for m in r.metrics if m.protocol)
    items = "".join(f"<li>{escape(text)}</li>" for text in protocols)
    notes = "".join(f"<li>{escape(note)}</li>" for note in results.notes)
    calibration = results.sweep.base.calibration.model_dump()
    blocks = (
        ("Calibration, where no axis says otherwise", calibration),
        ("Machine that collected the results", machine()),
        ("Versions", library_versions()),
    )
    parts = [f"<h3>{title}</h3>{facts_table(facts)}" for title, facts in blocks]
    return (
        "<section><h2>How it was made</h2>"
        + (f'<h3>Measurements</h3><ul class="notes">{items}</ul>' if items else "")
        + (f'<h3>On the way</h3><ul class="notes">{notes}</ul>' if notes else "")
        + "".join(parts)
        + "</section><footer class='muted'>secateur</footer>"
    )
