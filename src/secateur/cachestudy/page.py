"""``cache.html``: quality against the bytes that are held, needles by depth and length, tokens per second over the
length of the prompt, and all numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from html import escape
from typing import Any

from secateur.cachestudy.measuring import Measurement
from secateur.cachestudy.results import CacheComparison, Row, columns, equal_columns, speed_columns
from secateur.report.charts import INK, KEEP, RAISED, Chart, axis, frame
from secateur.report.looks import LOOKS_STYLE, Look, key_of, looks_of
from secateur.report.numbers import MISSING, format_value, percent
from secateur.report.page import facts_table, figure, page, table
from secateur.versions import library_versions, machine

_WIDE_RANGE = 8.0
"""perplexities that span more than this factor get a logarithmic axis"""


def render(made: CacheComparison) -> str:
    """The comparison as one HTML document that holds all it shows. Raises MissingExtraError without plotly."""
    charts: dict[str, Any] = {}
    sections = [_headline(made), _numbers(made), _quality(made, charts), _needles(made, charts), _speed(made, charts)]
    sections.append(_provenance(made))
    return page(f"Caches of {made.model}", sections, charts, "the page of a comparison of caches", LOOKS_STYLE)


def _headline(made: CacheComparison) -> str:
    said = "".join(f'<p class="lede">{escape(sentence)}</p>' for sentence in made.verdicts)
    wrong = "".join(f"<li>{escape(f'{row.spec}: {row.error}')}</li>" for row in made.failed)
    warning = f'<div class="box warning" role="note"><p>Failed:</p><ul>{wrong}</ul></div>' if wrong else ""
    return f'<header><p class="kicker">KV caches side by side</p><h1>{escape(made.model)}</h1>{said}{warning}</header>'


def _numbers(made: CacheComparison) -> str:
    missing = "".join(f"<li>{escape(one)}</li>" for one in made.missing)
    header, rows = equal_columns(made)
    equal = (
        f"<h3>At equal bytes</h3>{table(header, rows)}<p class='muted'>On the straight line between the settings of a "
        "press, of which the dense cache is one.</p>"
        if rows
        else ""
    )
    return (
        f"<section><h2>Table</h2>{table(*columns(made))}{equal}"
        + (f'<ul class="notes">{missing}</ul>' if missing else "")
        + "</section>"
    )


def _quality(made: CacheComparison, charts: dict[str, Any]) -> str:
    looks = looks_of(dict.fromkeys(row.press for row in made.rows[1:]))
    key = f"{key_of(looks)}<li><b>✕</b>dense</li>"
    drawn = (("perplexity", "perplexity", False), ("likelihood", "probability of a token of the answer", True))
    drawn += (("found", "answers that were written", True),)
    figures = [
        figure(chart, charts, key)
        for field, name, higher in drawn
        if (chart := quality_chart(made, field, name, higher, looks)) is not None
    ]
    return "\n".join(["<section><h2>Quality against bytes</h2>", *figures, "</section>"])


def quality_chart(made: CacheComparison, field: str, name: str, higher: bool, looks: dict[str, Look]) -> Chart | None:
    """One quality over the fraction of the dense bytes that is held, a line per press; None where it isn't known."""
    dense = made.rows[0]
    at = getattr(dense, field)
    if at is None:
        return None
    data, values = [], [at]
    for press, look in looks.items():
        rows = [row for row in made.rows if row.press == press and row.held is not None]
        rows = sorted((row for row in rows if getattr(row, field) is not None), key=lambda row: row.held or 0.0)
        values += [getattr(row, field) for row in rows]
        data.append(_line(rows, field, look))
    mark = {"symbol": "x", "color": INK, "size": 9, "opacity": 1}
    hover = "dense<extra></extra>"
    data.append({"type": "scatter", "x": [100], "y": [at], "mode": "markers", "marker": mark, "hovertemplate": hover})
    wide = min(values) > 0 and max(values) / min(values) > _WIDE_RANGE and not higher
    y = axis(escape(name), zeroline=False) | ({"type": "log", "nticks": 6} if wide else {"nticks": 6})
    x = axis("bytes held (% of dense)", zeroline=False, nticks=8)
    better = "higher" if higher else "lower"
    description = (
        f"Left is smaller, {better} is better{' (logarithmic scale)' if wide else ''}; bytes are those that are really "
        "held, indices and bitmaps included. A line joins the settings of a press."
    )
    layout = frame(380, x, y) | {"hovermode": "closest"}
    title = f"{name[0].upper()}{name[1:]} against bytes"
    return Chart(title, description, {"data": data, "layout": layout}, has_key=False)


def _line(rows: Sequence[Row], field: str, look: Look) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "x": [100 * (row.held or 0.0) for row in rows],
        "y": [getattr(row, field) for row in rows],
        "text": [f"{escape(row.spec)}<br>{percent(row.held or 0.0)} held" for row in rows],
        "hovertemplate": "%{text}: %{y:.4g}<extra></extra>",
        "line": {"width": 1.2, "color": look.colour},
        "marker": {"symbol": look.symbol, "color": look.colour, "size": 9, "opacity": 1},
    }


def _needles(made: CacheComparison, charts: dict[str, Any]) -> str:
    figures = [figure(chart, charts) for chart in heat_maps(made)]
    return "\n".join(["<section><h2>Needles</h2>", *figures, "</section>"]) if figures else ""


def heat_maps(made: CacheComparison) -> Iterator[Chart]:
    """Depth x length of every task and cache: the probability of an answer's token, and how often it is written."""
    asked = [one for one in made.measurements if one.log_likelihood is not None]
    for task in dict.fromkeys(one.task for one in asked):
        for spec in dict.fromkeys(one.spec for one in asked):
            yield heat_map(task, spec, [one for one in asked if one.task == task and one.spec == spec])


def heat_map(task: str, spec: str, cases: Sequence[Measurement]) -> Chart:
    """Cells are means over the cases of one depth and length."""
    depths = sorted({one.depth for one in cases})
    lengths = sorted({one.length for one in cases})

    def cell(length: int, depth: float) -> list[Measurement]:
        return [one for one in cases if one.length == length and one.depth == depth]

    grid = [[cell(length, depth) for depth in depths] for length in lengths]
    # a press that failed on the way has cells without a case
    likely = [[_geometric(several) if several else None for several in row] for row in grid]
    written = [[_written(several) if several else MISSING for several in row] for row in grid]
    data = [
        {
            "type": "heatmap",
            "x": [percent(depth) for depth in depths],
            "y": [f"{length:,}" for length in lengths],
            "z": likely,
            "zmin": 0,
            "zmax": 1,
            "xgap": 1,
            "ygap": 1,
            "colorscale": [[0, RAISED], [1, KEEP]],
            "text": written,
            "texttemplate": "%{text}",
            "hovertemplate": "%{y} tokens, depth %{x}: p %{z:.2f}, %{text} written<extra></extra>",
            "colorbar": {"thickness": 8, "nticks": 3, "outlinewidth": 0},
        }
    ]
    y = axis("tokens", autorange="reversed", showgrid=False, ticklabelstandoff=4, type="category")
    x = axis("depth of the needle", showgrid=False, type="category")
    mean = format_value(_geometric(cases))
    description = (
        f"Colour: probability of a token of the answer, {mean} in the mean; numbers: how often the answer was written, "
        f"{_written(cases)} of {len(cases)}."
    )
    layout = frame(110 + 28 * len(lengths), x, y)
    return Chart(f"{task}: {spec}", description, {"data": data, "layout": layout}, has_key=False)


def _geometric(cases: Sequence[Measurement]) -> float:
    return math.exp(sum(one.log_likelihood or 0.0 for one in cases) / len(cases))


def _written(cases: Sequence[Measurement]) -> str:
    return percent(sum(bool(one.found) for one in cases) / len(cases))


def _speed(made: CacheComparison, charts: dict[str, Any]) -> str:
    header, rows = speed_columns(made)
    if not rows:
        return ""
    looks = looks_of(row.spec for row in made.rows if row.speeds)
    drawn = (("prefill", "Reading a prompt"), ("decode", "Writing behind a prompt"))
    figures = [figure(speed_chart(made, field, title, looks), charts, key_of(looks)) for field, title in drawn]
    return "\n".join(["<section><h2>Speed</h2>", table(header, rows), *figures, "</section>"])


def speed_chart(made: CacheComparison, field: str, title: str, looks: dict[str, Look]) -> Chart:
    """Tokens per second over the length of the prompt, a line per cache; ``field`` is ``prefill`` or ``decode``."""
    data = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "x": [at.tokens for at in row.speeds],
            "y": [getattr(at, field) for at in row.speeds],
            "hovertemplate": f"{escape(row.spec)}: %{{y:.4g}} tokens/s at %{{x:,}}<extra></extra>",
            "line": {"width": 1.2, "color": looks[row.spec].colour},
            "marker": {"symbol": looks[row.spec].symbol, "color": looks[row.spec].colour, "size": 9, "opacity": 1},
        }
        for row in made.rows
        if row.speeds
    ]
    asked = made.protocol
    what = "compressing its cache is part of it" if field == "prefill" else f"{asked.new} tokens with every cache"
    description = f"Higher is faster; {what}. Medians of {asked.repeats} repeats in which the caches took turns."
    x, y = axis("tokens of the prompt", zeroline=False, nticks=8), axis("tokens/s", rangemode="tozero", nticks=6)
    layout = frame(340, x, y) | {"hovermode": "closest"}
    return Chart(title, description, {"data": data, "layout": layout}, has_key=False)


def _provenance(made: CacheComparison) -> str:
    said = "".join(f"<li>{escape(line)}</li>" for line in made.protocol.describe())
    blocks = (("Asked", asdict(made.protocol)), ("Machine", machine()), ("Versions", library_versions()))
    parts = [f"<h3>{title}</h3>{facts_table(facts)}" for title, facts in blocks]
    rule = (
        "<p>Every prompt is read dense, once, and its cache compressed at its end, by every setting. What is measured "
        "is read behind what is left.</p>"
    )
    return (
        f'<section><h2>How it was made</h2>{rule}<ul class="notes">{said}</ul>'
        + "".join(parts)
        + "</section><footer class='muted'>secateur</footer>"
    )
