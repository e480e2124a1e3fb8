"""What a study of stability shows: a table, a document for machines, and a page with the curves."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from html import escape
from typing import Any

from secateur.report.charts import Chart, axis, frame
from secateur.report.looks import LOOKS_STYLE, key_of, looks_of
from secateur.report.numbers import format_value
from secateur.report.page import facts_table, figure, page, table
from secateur.rounds.stability import Instability, Stability
from secateur.versions import library_versions, machine


def columns(found: Stability, metric: str, within: float) -> tuple[list[str], list[list[str]]]:
    """Header and rows: both copies, the worst point between them, and the verdict, by the step at which they part."""
    header = ["step", f"{metric} of both", "worst between", "barrier", "distance", "angle", ""]
    rows = []
    for one in found.found:
        curve = one.curves[metric]
        values = [curve.ends, curve.worst, curve.barrier, one.l2, one.angle]
        verdict = "stable" if one.stable(metric, within) else ""
        rows.append([str(one.step), *(format_value(value) for value in values), verdict])
    return header, rows


def verdict(found: Stability, metric: str, within: float) -> str:
    """From which step on training is stable, in one sentence."""
    onset = found.onset(metric, within)
    limit = f"the {metric} between copies is nowhere {within:g} worse than theirs"
    if onset is None:
        return f"not stable at the last of these steps, {found.found[-1].step}; stable would be where {limit}"
    return f"stable from step {onset} on: {limit}"


def document(found: Stability, metric: str, within: float) -> dict[str, Any]:
    """Everything, as plain values."""
    return {
        "metric": metric,
        "within": within,
        "onset": found.onset(metric, within),
        "steps": [{**dataclasses.asdict(one), "barriers": one.barriers} for one in found.found],
        "protocol": found.protocol,
        "machine": machine(),
        "versions": library_versions(),
    }


def render(found: Stability, metric: str, within: float, name: str) -> str:
    """One HTML document that holds all it shows. Raises MissingExtraError without plotly."""
    charts: dict[str, Any] = {}
    head = (
        '<header><p class="kicker">Stability of training</p>'
        f'<h1>{escape(name)}</h1><p class="lede">{escape(verdict(found, metric, within).capitalize())}.</p></header>'
    )
    metrics = [metric, *(other for other in found.found[0].curves if other != metric)]
    steps = {f"step {one.step}": one for one in found.found}
    key = key_of(looks_of(steps))
    figures = [figure(line_chart(list(steps.values()), one), charts, key) for one in metrics]
    sections = [
        head,
        "\n".join(
            ["<section><h2>Between two copies</h2>", *figures, table(*columns(found, metric, within)), "</section>"]
        ),
        "<section><h2>How it was made</h2>"
        + "".join(
            f"<h3>{title}</h3>{facts_table(facts)}"
            for title, facts in (("Protocol", found.protocol), ("Machine", machine()), ("Versions", library_versions()))
        )
        + "</section><footer class='muted'>secateur</footer>",
    ]
    return page(f"Stability of {name}", sections, charts, "the page of a study of stability", LOOKS_STYLE)


def line_chart(found: Sequence[Instability], metric: str) -> Chart:
    """One metric along the line, a curve by the step at which copies parted."""
    looks = looks_of(f"step {one.step}" for one in found)
    data = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "x": list(one.curves[metric].alphas),
            "y": list(one.curves[metric].values),
            "line": {"width": 2, "color": look.colour},
            "marker": {"size": 5, "symbol": look.symbol, "color": look.colour},
            "hovertemplate": f"{name}, alpha %{{x:.2f}}: %{{y:.4g}}<extra></extra>",
        }
        for one, (name, look) in zip(found, looks.items(), strict=True)
    ]
    better = "higher" if found[0].curves[metric].higher_is_better else "lower"
    barriers = ", ".join(f"{format_value(one.curves[metric].barrier)} from step {one.step}" for one in found)
    said = f"{metric} from one copy (0) to the other (1), {better} is better; barriers: {barriers}."
    x, y = axis("alpha", zeroline=False, nticks=6), axis(escape(metric), zeroline=False, nticks=6)
    title = f"{metric} on the line between two copies"
    return Chart(title, said, {"data": data, "layout": frame(340, x, y)}, has_key=False)
