"""What every HTML page of ours is made of: the frame with its styles and scripts, charts and tables."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from secateur.errors import require_extra
from secateur.report.charts import Chart
from secateur.report.numbers import MISSING
from secateur.report.template import PAGE, POLICY, SCRIPT, STYLE


def page(title: str, sections: Iterable[str], charts: Mapping[str, Any], what: str, style: str = "") -> str:
    """One HTML document that holds everything it shows; empty ``sections`` are left out.

    ``charts`` maps the ids that ``figure`` gave to their plotly figures; ``style`` is added to the common one.
    Raises MissingExtraError, which says that ``what`` needs plotly, without it.
    """
    plotly = require_extra("plotly.offline", "report", what)
    return PAGE.format(
        policy=POLICY,
        title=escape(title),
        style=STYLE + style,
        body="\n".join(section for section in sections if section),
        charts=script_json(charts),
        plotly=plotly.get_plotlyjs(),
        script=SCRIPT,
    )


def script_json(value: Any) -> str:
    """JSON that may stand inside a script element."""
    # "<" would let text inside the JSON close the script element
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def figure(chart: Chart, charts: dict[str, Any], key: str | None = None) -> str:
    """A chart with its title, words and key; its figure is added to ``charts``. ``key`` holds list items as HTML."""
    name = f"chart-{len(charts) + 1}"
    charts[name] = chart.figure
    if key is None and chart.has_key:
        key = '<li><i class="keep"></i>kept</li><li><i class="removed"></i>removed</li>'
    return (
        f"<h3>{escape(chart.title)}</h3><figure>"
        f"<figcaption>{escape(chart.description)}</figcaption>"
        + (f'<ul class="key">{key}</ul>' if key else "")
        + f'<div class="chart" id="{name}" role="img" style="min-height:{chart.figure["layout"]["height"]}px"'
        f' aria-label="{escape(f"{chart.title}, chart. {chart.description}")}"></div></figure>'
    )


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Plain cells; the first of every row is its heading."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    return scrolling(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")


def scrolling(table: str) -> str:
    """A table that scrolls sideways where it is too wide."""
    # focusable, so that the keyboard can scroll it too
    return f'<div class="scroll" tabindex="0" role="region" aria-label="table">{table}</div>'


def facts_table(facts: Mapping[str, Any]) -> str:
    """Names and values in two columns."""
    rows = "".join(
        f'<tr><th scope="row">{escape(str(key).replace("_", " "))}</th><td>{escape(_fact(value))}</td></tr>'
        for key, value in facts.items()
    )
    return f'<table class="facts"><tbody>{rows}</tbody></table>'


def _fact(value: Any) -> str:
    if value is None or value == "":
        return MISSING
    if isinstance(value, (list, tuple)):
        return ", ".join(str(v) for v in value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) and value >= 10_000 else str(value)
