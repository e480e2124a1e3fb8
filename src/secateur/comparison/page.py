"""``compare.html``: the verdict, the table, quality against cost, what every method keeps, and what plans share."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from secateur.comparison.rows import Comparison, Overlap, Row
from secateur.comparison.table import caption, columns
from secateur.comparison.verdict import SURE
from secateur.report.charts import INK, KEEP, KIND_WORDS, RAISED, REMOVED, Chart, axis, frame, layer_axis
from secateur.report.looks import LOOKS_STYLE, Look, key_of, looks_of
from secateur.report.numbers import MISSING, format_value, percent
from secateur.report.page import facts_table, figure, page, table
from secateur.sweep.pareto import COSTS, REQUEST, Cost
from secateur.sweep.records import DENSE, Record
from secateur.versions import library_versions, machine

_WIDE_RANGE = 8.0
"""qualities that span more than this factor get a logarithmic axis"""
_DRAWN = ("parameters", "non-zero parameters", REQUEST, "latency")


def render(comparison: Comparison) -> str:
    """The comparison as one HTML document that holds all it shows. Raises MissingExtraError without plotly."""
    charts: dict[str, Any] = {}
    sections = [
        _headline(comparison),
        _numbers(comparison),
        _quality(comparison, charts),
        _kept(comparison, charts),
        _overlaps(comparison, charts),
        _provenance(comparison),
    ]
    title = f"Comparison of methods on {comparison.results.sweep.base.model}"
    return page(title, sections, charts, "the page of a comparison", LOOKS_STYLE)


def _headline(comparison: Comparison) -> str:
    verdicts = "".join(f'<p class="lede">{escape(verdict.sentence)}</p>' for verdict in comparison.first_verdicts)
    failed = "".join(f"<li>{escape(record.name)}: {escape(record.error)}</li>" for record in comparison.results.failed)
    warning = f'<div class="box warning" role="note"><p>Failed:</p><ul>{failed}</ul></div>' if failed else ""
    model = escape(str(comparison.results.sweep.base.model))
    return f'<header><p class="kicker">Methods side by side</p><h1>{model}</h1>{verdicts}{warning}</header>'


def _numbers(comparison: Comparison) -> str:
    header, rows = columns(comparison)
    # a row is headed by its method; one without a sparsity goes on with that of the row above
    shown, last = [], ""
    for sparsity, method, *rest in rows:
        last = sparsity or last
        shown.append([method, last or MISSING, *rest])
    first = next(iter(comparison.metrics), None)
    further = [verdict.sentence for verdict in comparison.verdicts if verdict.metric != first]
    others = "".join(f"<li>{escape(sentence)}</li>" for sentence in further)
    return (
        f"<section><h2>Table</h2>{table([header[1], header[0], *header[2:]], shown)}"
        f'<p class="muted">{escape(caption(comparison))}</p>'
        + (f'<h3>By the other metrics</h3><ul class="notes">{others}</ul>' if others else "")
        + "</section>"
    )


def _quality(comparison: Comparison, charts: dict[str, Any]) -> str:
    looks = looks_of(comparison.asked.contenders)
    key = f"{key_of(looks)}<li><b>✕</b>{DENSE}</li>"
    figures = []
    costs = {cost.name: cost for cost in COSTS}
    for position, metric in enumerate(comparison.metrics):
        # every metric against parameters, the first one against all costs
        for cost in map(costs.__getitem__, _DRAWN if position == 0 else _DRAWN[:1]):
            chart = quality_chart(comparison, metric, cost, looks)
            figures += [figure(chart, charts, key)] if chart else []
    return "\n".join(["<section><h2>Quality against cost</h2>", *figures, "</section>"]) if figures else ""


def quality_chart(comparison: Comparison, metric: str, cost: Cost, looks: dict[str, Look]) -> Chart | None:
    """One metric over one cost, a line per method; None where the rows don't differ in that cost."""
    places: dict[str, list[tuple[float, float, Row]]] = {}
    for row in comparison.rows:
        price, value = _price(row, cost, comparison.dense), row.mean(metric)
        if row.done and price is not None and value is not None:
            places.setdefault(row.method, []).append((price, value, row))
    if len({price for several in places.values() for price, _, _ in several}) < 2:
        return None
    data = [_line(method, metric, several, looks[method]) for method, several in places.items()]
    dense = comparison.dense
    at = (cost.of(dense), dense.metric(metric)) if dense is not None else (None, None)
    if None not in at:
        mark = {"symbol": "x", "color": INK, "size": 9, "opacity": 1}
        hover = f"{DENSE}<extra></extra>"
        data.append(_trace([at[0]], [at[1]]) | {"mode": "markers", "marker": mark, "hovertemplate": hover})
    values = [value for several in places.values() for _, value, _ in several] + [v for v in at[1:] if v is not None]
    wide = min(values) > 0 and max(values) / min(values) > _WIDE_RANGE
    y = axis(escape(metric), zeroline=False) | ({"type": "log", "nticks": 6} if wide else {"nticks": 6})
    unit = {"ms/token": " (ms per token)", "ms": " (ms)"}.get(cost.unit, "")
    x = axis(f"{cost.name}{unit}", zeroline=False, tickformat="~s", nticks=6)
    better = "higher" if comparison.metrics[metric] else "lower"
    description = (
        f"Left is cheaper, {better} is better{' (logarithmic scale)' if wide else ''}; a line joins the budgets of a "
        "method, a bar is the standard deviation over seeds."
    )
    layout = frame(380, x, y) | {"hovermode": "closest"}
    return Chart(f"{metric} against {cost.name}", description, {"data": data, "layout": layout}, has_key=False)


def _price(row: Row, cost: Cost, dense: Record | None) -> float | None:
    """The mean cost over the seeds; of a request the one that is comparable over time."""
    if cost.name == REQUEST:
        return None if dense is None else row.request_ms(dense)
    prices = [price for record in row.records if (price := cost.of(record)) is not None]
    return sum(prices) / len(prices) if prices else None


def _line(method: str, metric: str, several: Sequence[tuple[float, float, Row]], look: Look) -> dict[str, Any]:
    spreads = [row.spread(metric) or 0.0 for _, _, row in several]
    texts = [
        f"{escape(method)} at {row.sparsity:g}<br>{escape(metric)} {format_value(value)}"
        + ("" if row.meets_budget else "<br>off budget")
        for _, value, row in several
    ]
    return _trace([price for price, _, _ in several], [value for _, value, _ in several]) | {
        "mode": "lines+markers",
        "text": texts,
        "hovertemplate": "%{text}<extra></extra>",
        "line": {"width": 1.2, "color": look.colour},
        "marker": {"symbol": look.symbol, "color": look.colour, "size": 9, "opacity": 1},
        "error_y": {"type": "data", "array": spreads, "visible": any(spreads), "color": look.colour, "thickness": 1.2},
    }


def _trace(x: Sequence[Any], y: Sequence[Any]) -> dict[str, Any]:
    return {"type": "scatter", "x": list(x), "y": list(y)}


def _kept(comparison: Comparison, charts: dict[str, Any]) -> str:
    kinds = dict.fromkeys(kind for row in comparison.rows for record in row.records for kind in record.kept)
    figures = []
    for sparsity in comparison.asked.sparsities:
        rows = [row for row in comparison.rows if row.sparsity == sparsity and row.done]
        for kind in kinds:
            # whole blocks are seen among the weights, and take heads and neurons with them
            chart = kept_chart(rows, kind) if kind != "layer" else None
            figures += [figure(chart, charts)] if chart else []
    return "\n".join(["<section><h2>What every layer keeps</h2>", *figures, "</section>"]) if figures else ""


def kept_chart(rows: Sequence[Row], kind: str) -> Chart | None:
    """Heat map of the fraction that stays, methods × layers, at one budget."""
    kept = {row.method: values for row in rows if (values := row.kept(kind)) is not None}
    if not kept:
        return None
    word = "weights" if kind == "weights" else KIND_WORDS.get(kind, kind)
    everything = [value for values in kept.values() for value in values]
    layers = list(range(max(map(len, kept.values()))))
    data = [
        {
            "type": "heatmap",
            "x": layers,
            "y": [escape(name) for name in kept],
            "z": [[round(value, 4) for value in values] for values in kept.values()],
            "zmin": 0,
            "zmax": 1,
            "xgap": 1,
            "ygap": 1,
            "colorscale": [[0, RAISED], [1, KEEP]],
            "hovertemplate": f"%{{y}}, layer %{{x}}: %{{z:.0%}} of the {word} stay<extra></extra>",
            "colorbar": {"thickness": 8, "tickformat": ".0%", "nticks": 3, "outlinewidth": 0},
        }
    ]
    y = axis("", autorange="reversed", showgrid=False, ticklabelstandoff=4)
    layout = frame(90 + 24 * len(kept), layer_axis(layers), y)
    title = f"{word[0].upper()}{word[1:]} that stay at sparsity {rows[0].sparsity:g}"
    description = f"Between {percent(min(everything))} and {percent(max(everything))} of a layer's {word} stay."
    return Chart(title, description, {"data": data, "layout": layout}, has_key=False)


def _overlaps(comparison: Comparison, charts: dict[str, Any]) -> str:
    figures = [figure(overlap_chart(overlap), charts) for overlap in comparison.overlaps]
    return "\n".join(["<section><h2>Overlap of the plans</h2>", *figures, "</section>"]) if figures else ""


def overlap_chart(overlap: Overlap) -> Chart:
    """Heat map of what pairs of plans remove in common."""
    names = [escape(name) for name in overlap.methods]
    others = [v for a, row in enumerate(overlap.jaccard) for b, v in enumerate(row) if a < b and v is not None]
    data = [
        {
            "type": "heatmap",
            "x": names,
            "y": names,
            "z": overlap.jaccard,
            "zmin": 0,
            "zmax": 1,
            "xgap": 1,
            "ygap": 1,
            "colorscale": [[0, RAISED], [1, REMOVED.replace(")", "soft)")]],
            "text": [[MISSING if v is None else f"{v:.2f}" for v in row] for row in overlap.jaccard],
            "texttemplate": "%{text}",
            "textfont": {"color": INK},
            "hovertemplate": "%{y} and %{x}: %{text}<extra></extra>",
            "showscale": False,
        }
    ]
    x = axis("", showgrid=False, tickangle=-35)
    y = axis("", autorange="reversed", showgrid=False, ticklabelstandoff=4)
    layout = frame(130 + 30 * len(names), x, y)
    between = f"; between two methods it is {min(others):.2f} to {max(others):.2f}" if others else ""
    description = f"The weights that both plans remove over those that either removes (Jaccard){between}."
    return Chart(f"Overlap at sparsity {overlap.sparsity:g}", description, {"data": data, "layout": layout}, False)


def _provenance(comparison: Comparison) -> str:
    base = comparison.results.sweep.base
    records = [record for record in [comparison.dense, *comparison.results.points] if record is not None]
    protocols = dict.fromkeys(f"{m.name}: {m.protocol}" for r in records for m in r.metrics if m.protocol)
    items = "".join(f"<li>{escape(text)}</li>" for text in protocols)
    notes = "".join(f"<li>{escape(note)}</li>" for note in comparison.notes)
    rule = (
        "<p>Methods read the same windows, and every seed draws the calibration text anew. For the probability windows "
        "are drawn anew, with replacement, and the mean over several seeds is shifted by its standard error times a "
        "draw of Student's t; the probability is the fraction of draws in which one method is better than the other. "
        f"Below {SURE:g} two methods are not distinguishable. With one seed it covers the windows alone, and not "
        "another draw of the calibration text. It holds for this text, and not for other texts or tasks.</p>"
    )
    asked = {
        "methods": comparison.asked.contenders,
        "seeds": comparison.asked.seeds,
        "tolerance": comparison.asked.tolerance,
        **comparison.for_all,
        "dtype": base.dtype,
    }
    calibration = base.calibration.model_dump(exclude={"seed"})
    blocks = (("Asked", asked), ("Calibration", calibration), ("Machine", machine()), ("Versions", library_versions()))
    parts = [f"<h3>{title}</h3>{facts_table(facts)}" for title, facts in blocks]
    return (
        f'<section><h2>How it was made</h2>{rule}<h3>Measurements</h3><ul class="notes">{items}</ul>'
        + (f'<h3>Notes</h3><ul class="notes">{notes}</ul>' if notes else "")
        + "".join(parts)
        + "</section><footer class='muted'>secateur</footer>"
    )
