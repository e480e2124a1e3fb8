"""What a study of stability shows: a table, a document for machines, and a page with the curves."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from secateur.report.charts import Chart, axis, frame
from secateur.report.looks import LOOKS_STYLE, key_of, looks_of
from secateur.report.numbers import format_value
from secateur.report.page import facts_table, figure, page, table
from secateur.report.training import flat
from secateur.rounds.stability import Instability, Stability
from secateur.versions import library_versions, machine


@dataclass(frozen=True)
class Limit:
    """The number that decides, and how much worse it may be between two copies; ``unit`` as in ``format_value``."""

    metric: str
    within: float
    unit: str = ""

    def said(self, value: float) -> str:
        """A value of the number, or a difference of two."""
        return format_value(value, self.unit)


def columns(found: Stability, limit: Limit) -> tuple[list[str], list[list[str]]]:
    """Header and rows: both copies, the worst point between them, and the verdict, by the step at which they part."""
    header = ["step", f"{limit.metric} of both", "worst between", "barrier", "distance", "angle", ""]
    rows = []
    for one in found.found:
        curve = one.curves[limit.metric]
        values = [limit.said(value) for value in (curve.ends, curve.worst, curve.barrier)]
        verdict = "stable" if one.stable(limit.metric, limit.within) else ""
        rows.append([str(one.step), *values, format_value(one.l2), format_value(one.angle), verdict])
    return header, rows


def verdict(found: Stability, limit: Limit) -> str:
    """From which step on training is stable, in one sentence."""
    onset = found.onset(limit.metric, limit.within)
    where = f"the {limit.metric} between copies is nowhere {limit.said(limit.within)} worse than theirs"
    if onset is None:
        return f"not stable at the last of these steps, {found.found[-1].step}; stable would be where {where}"
    return f"stable from step {onset} on: {where}"


def document(found: Stability, limit: Limit) -> dict[str, Any]:
    """Everything, as plain values."""
    return {
        "metric": limit.metric,
        "within": limit.within,
        "onset": found.onset(limit.metric, limit.within),
        "steps": [{**dataclasses.asdict(one), "barriers": one.barriers} for one in found.found],
        "protocol": found.protocol,
        "machine": machine(),
        "versions": library_versions(),
    }


def render(found: Stability, limit: Limit, name: str) -> str:
    """One HTML document that holds all it shows. Raises MissingExtraError without plotly."""
    charts: dict[str, Any] = {}
    head = (
        '<header><p class="kicker">Stability of training</p>'
        f'<h1>{escape(name)}</h1><p class="lede">{escape(verdict(found, limit).capitalize())}.</p></header>'
    )
    units = {limit.metric: limit.unit}
    metrics = [limit.metric, *(other for other in found.found[0].curves if other != limit.metric)]
    steps = {f"step {one.step}": one for one in found.found}
    key = key_of(looks_of(steps))
    figures = [figure(line_chart(list(steps.values()), one, units.get(one, "")), charts, key) for one in metrics]
    sections = [
        head,
        "\n".join(["<section><h2>Between two copies</h2>", *figures, table(*columns(found, limit)), "</section>"]),
        "<section><h2>How it was made</h2>"
        + "".join(
            f"<h3>{title}</h3>{facts_table(facts)}"
            for title, facts in (
                ("Protocol", dict(flat(found.protocol))),
                ("Machine", machine()),
                ("Versions", library_versions()),
            )
        )
        + "</section><footer class='muted'>secateur</footer>",
    ]
    return page(f"Stability of {name}", sections, charts, "the page of a study of stability", LOOKS_STYLE)


def line_chart(found: Sequence[Instability], metric: str, unit: str = "") -> Chart:
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
    barriers = ", ".join(f"{format_value(one.curves[metric].barrier, unit)} from step {one.step}" for one in found)
    said = f"{metric} from one copy (0) to the other (1), {better} is better; barriers: {barriers}."
    per_cent = {"tickformat": ".1%"} if unit == "fraction" else {}
    x, y = axis("alpha", zeroline=False, nticks=6), axis(escape(metric), zeroline=False, nticks=6, **per_cent)
    title = f"{metric} on the line between two copies"
    return Chart(title, said, {"data": data, "layout": frame(340, x, y)}, has_key=False)
