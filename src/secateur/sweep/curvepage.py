"""``curve.html``: quality over sparsity, what was run, what is expected between, the knee and the setting to take."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from secateur.report.charts import INK, KEEP, MUTED, REMOVED, Chart, axis, frame
from secateur.report.numbers import MISSING, format_value
from secateur.report.page import facts_table, figure, page, table
from secateur.sweep.curve import Curve
from secateur.sweep.runner import Results
from secateur.versions import library_versions, machine

_KEY = (
    '<li><b style="color:var(--keep)">●</b>run</li><li><b style="color:var(--muted)">─</b>expected between</li>'
    '<li><b style="color:var(--removed)">◆</b>knee</li>'
)
_STYLE = ".key b { margin-right: .35rem; font-weight: 400; }\n"
_WIDE_RANGE = 8.0
"""values that span more than this factor get a logarithmic axis"""


def render_curve(curves: Sequence[Curve], results: Results) -> str:
    """The curves as one HTML document that holds all it shows. Raises MissingExtraError without plotly."""
    charts: dict[str, Any] = {}
    base = results.sweep.base
    figures = "\n".join(figure(curve_chart(curve), charts, _KEY) for curve in curves)
    sections = [
        f'<header><p class="kicker">How far can one go?</p><h1>{escape(str(base.model))}</h1>'
        f'<p class="lede">{escape(verdict(curves[0], results))}</p></header>',
        f"<section><h2>Curves</h2>{figures}</section>",
        f"<section><h2>Points</h2>{table(*points_table(curves, results))}</section>",
        _provenance(curves, results),
    ]
    return page(f"Curve of {base.model}", sections, charts, "the page of a curve", _STYLE)


def verdict(curve: Curve, results: Results) -> str:
    """The recommendation in one or two sentences."""
    step = results.sweep.base.steps[0]
    how = f"{step.method} with {step.allocate}" if step.allocate else step.method
    at = curve.measured if curve.measured is not None else curve.predicted[curve.grid.index(curve.recommended)]
    text = (
        f"{how}: sparsity {curve.recommended:g} is recommended, with {curve.metric} {format_value(at)} "
        f"({format_value(curve.dense)} dense)"
    )
    if curve.prediction is not None and curve.measured is not None:
        text += f"; {format_value(curve.prediction)} was expected from the other points"
    return f"{text}. The knee of the curve is at {curve.knee:g}."


def points_table(curves: Sequence[Curve], results: Results) -> tuple[list[str], list[list[str]]]:
    """Header and rows: every sparsity that was run, with all its metrics, and what became of the rest."""
    header = ["sparsity", *(curve.metric for curve in curves), ""]
    sparsities = sorted({x for curve in curves for x in curve.points})
    rows = []
    for x in sparsities:
        marks = ["dense"] if x == 0 else []
        marks += ["knee"] if x == curves[0].knee else []
        marks += ["recommended"] if x == curves[0].recommended else []
        cells = [format_value(curve.points[x]) if x in curve.points else MISSING for curve in curves]
        rows.append([f"{x:g}", *cells, ", ".join(marks)])
    rows += [[f"{r.values['sparsity']:g}", *["failed"] * len(curves), r.error] for r in results.failed if r.values]
    return header, rows


def curve_chart(curve: Curve) -> Chart:
    """One metric over sparsity."""
    x, y = list(curve.points), list(curve.points.values())
    at_knee = curve.predicted[curve.grid.index(curve.knee)]
    hover = "sparsity %{x:.2f}: %{y:.4g}<extra></extra>"
    data: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "lines",
            "x": list(curve.grid),
            "y": list(curve.predicted),
            "line": {"width": 1.5, "color": MUTED},
            "hovertemplate": hover,
        },
        {
            "type": "scatter",
            "mode": "markers",
            "x": x,
            "y": y,
            "marker": {"size": 9, "color": [INK if one == 0 else KEEP for one in x], "opacity": 1},
            "hovertemplate": hover,
        },
        {
            "type": "scatter",
            "mode": "markers",
            "x": [curve.knee],
            "y": [at_knee],
            "marker": {"symbol": "diamond-open", "size": 15, "color": REMOVED, "opacity": 1},
            "hovertemplate": "knee<extra></extra>",
        },
    ]
    wide = min(y) > 0 and max(y) / min(y) > _WIDE_RANGE
    vertical = axis(escape(curve.metric), zeroline=False) | ({"type": "log", "nticks": 6} if wide else {"nticks": 6})
    layout = frame(340, axis("sparsity", zeroline=False, nticks=8), vertical) | {"hovermode": "closest"}
    better = "higher" if curve.higher_is_better else "lower"
    description = (
        f"{better.capitalize()} is better{' (logarithmic scale)' if wide else ''}; {len(x) - 1} sparsities were run, "
        f"from {format_value(y[0])} dense to {format_value(y[-1])} at {x[-1]:g}; the knee is at {curve.knee:g}."
    )
    return Chart(f"{curve.metric} over sparsity", description, {"data": data, "layout": layout}, has_key=False)


def _provenance(curves: Sequence[Curve], results: Results) -> str:
    base = results.sweep.base
    items = "".join(f"<li>{escape(f'{curve.metric}: {curve.protocol}')}</li>" for curve in curves)
    rule = (
        "<p>The knee is where the curve lies furthest below the straight line from the dense model to the last point, "
        "both axes scaled to [0, 1], perplexities by their logarithm.</p>"
    )
    step = {key: value for key, value in base.steps[0].model_dump().items() if value and key != "sparsity"}
    blocks = (("What was run", step), ("Calibration", base.calibration.model_dump()), ("Machine", machine()))
    parts = [f"<h3>{title}</h3>{facts_table(facts)}" for title, facts in (*blocks, ("Versions", library_versions()))]
    return (
        f'<section><h2>How it was made</h2>{rule}<ul class="notes">{items}</ul>'
        + "".join(parts)
        + "</section><footer class='muted'>secateur</footer>"
    )
