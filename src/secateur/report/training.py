"""A training in a report: loss and learning rate, what was measured, the sparsity, and what every layer kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from secateur.report.charts import INK, KEEP, MUTED, REMOVED, Chart, axis, frame, running_mean
from secateur.report.numbers import format_value, percent
from secateur.report.page import facts_table, figure, table

_POINTS = 1000
"""steps that a curve is drawn with at most"""


def training_section(training: Mapping[str, Any], charts: dict[str, Any]) -> str:
    """One training as HTML; its figures are added to ``charts``."""
    drawn = [figure(quality_chart(training), charts), figure(losses_chart(training), charts)]
    if training["sparsities"]:
        drawn.append(figure(sparsity_over_steps(training), charts))
    if training["layers"]:
        drawn.append(figure(layers_chart(training), charts))
        rows = [[name, percent(value)] for name, value in training["layers"].items()]
        drawn.append(
            f"<details><summary>The layers in numbers</summary>{table(['weight', 'sparsity'], rows)}</details>"
        )
    facts = dict(flat(training["recipe"]))
    return (
        f"<section><h2>Training</h2><p>{escape(summary(training))}</p>{''.join(drawn)}"
        f"<details><summary>What was measured, in numbers</summary>{table(*measured_rows(training))}</details>"
        f"<details><summary>The recipe</summary>{facts_table(facts)}</details></section>"
    )


def summary(training: Mapping[str, Any]) -> str:
    """What training gave, in a sentence."""
    steps, quality = len(training["losses"]), training["quality"]
    before, after = (numbers[quality] for _, numbers in (training["measured"][0], training["measured"][-1]))
    unit = "fraction" if quality == "accuracy" else ""
    epochs = steps * training["batch"] / training["count"]
    return (
        f"{steps:,} steps of {training['batch']} {training['what']} ({format_value(epochs)} epochs of"
        f" {training['count']:,}): {quality} {format_value(before, unit)} → {format_value(after, unit)}."
    )


def measured_rows(training: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: what was measured after so many steps."""
    names = list(training["measured"][0][1])
    units = {"accuracy": "fraction"}
    rows = [
        [f"{step:,}", *(format_value(numbers[name], units.get(name, "")) for name in names)]
        for step, numbers in training["measured"]
    ]
    return ["steps", *names], rows


def flat(values: Mapping[str, Any], before: str = "") -> list[tuple[str, Any]]:
    """Nested mappings as one, with dots in the names."""
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        found += flat(value, f"{before}{key}.") if isinstance(value, Mapping) else [(f"{before}{key}", value)]
    return found


def quality_chart(training: Mapping[str, Any]) -> Chart:
    """What counts, over steps."""
    quality = training["quality"]
    steps = [step for step, _ in training["measured"]]
    values = [numbers[quality] for _, numbers in training["measured"]]
    y = axis(quality, zeroline=False, nticks=6, **({"tickformat": ".0%"} if quality == "accuracy" else {}))
    if quality != "accuracy" and min(values) > 0 and max(values) / min(values) > 8:
        y |= {"type": "log", "dtick": 1, "tickformat": "~g"}
    data = [_line(steps, values, KEEP, mode="lines+markers")]
    layout = frame(260, axis("step", zeroline=False, tickformat="d"), y)
    unit = "fraction" if quality == "accuracy" else ""
    said = f"On what was not trained on, from {format_value(values[0], unit)} to {format_value(values[-1], unit)}."
    return Chart(quality[0].upper() + quality[1:], said, {"data": data, "layout": layout}, has_key=False)


def losses_chart(training: Mapping[str, Any]) -> Chart:
    """The loss of every step, faint, its running mean, and the learning rate on an axis of its own."""
    losses = training["losses"]
    steps = list(range(1, len(losses) + 1))
    means, window = running_mean(losses)
    data = [
        _line(*_thinned(steps, losses), MUTED, width=1, opacity=0.5),
        _line(*_thinned(steps, means), INK),
        {**_line(*_thinned(steps, training["rates"]), REMOVED, width=1), "yaxis": "y2"},
    ]
    layout = frame(260, axis("step", zeroline=False, tickformat="d"), axis("loss", zeroline=False, nticks=6))
    layout["yaxis2"] = axis("learning rate", overlaying="y", side="right", showgrid=False, zeroline=False, nticks=4)
    said = f"Loss of every step, its mean over {window} steps, and the learning rate (right)."
    return Chart("Loss", said, {"data": data, "layout": layout}, has_key=False)


def sparsity_over_steps(training: Mapping[str, Any]) -> Chart:
    """The fraction of the pruned weights that is dead, behind every step."""
    values = training["sparsities"]
    data = [_line(*_thinned(list(range(1, len(values) + 1)), values), KEEP)]
    y = axis("sparsity", zeroline=False, tickformat=".0%", range=[0, 1])
    layout = frame(200, axis("step", zeroline=False, tickformat="d"), y)
    said = f"Fraction of the pruned weights that is zero, in the end {percent(values[-1])}."
    return Chart("Sparsity", said, {"data": data, "layout": layout}, has_key=False)


def layers_chart(training: Mapping[str, Any]) -> Chart:
    """The sparsity of every pruned weight, in the order of the network."""
    names, values = list(training["layers"]), list(training["layers"].values())
    bar = {
        "type": "bar",
        "x": list(range(len(names))),
        "y": values,
        "text": [escape(name) for name in names],
        "textposition": "none",
        "marker": {"color": REMOVED, "line": {"width": 0}},
        "hovertemplate": "%{text}: %{y:.1%}<extra></extra>",
    }
    y = axis("sparsity", zeroline=False, tickformat=".0%", range=[0, 1])
    layout = frame(220, axis("weight", showgrid=False, zeroline=False, tickformat="d"), y)
    said = f"{len(names)} weights, from {percent(min(values))} to {percent(max(values))}."
    return Chart("Sparsity of the layers", said, {"data": [bar], "layout": layout}, has_key=False)


def _line(x: Sequence[float], y: Sequence[float], colour: str, **how: Any) -> dict[str, Any]:
    mode, width = how.pop("mode", "lines"), how.pop("width", 2)
    return {
        "type": "scatter",
        "mode": mode,
        "x": list(x),
        "y": list(y),
        "line": {"width": width, "color": colour},
        "marker": {"size": 7, "color": colour},
        "hovertemplate": "step %{x}: %{y:.4g}<extra></extra>",
        **how,
    }


def _thinned(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    every = max(1, len(x) // _POINTS)
    return list(x[::every]), list(y[::every])
