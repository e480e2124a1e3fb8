"""Recovery training in a report: the loss, and quality against tokens spent."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from secateur.report.charts import INK, KEEP, MUTED, REMOVED, Chart, axis, frame, running_mean
from secateur.report.numbers import format_count, format_value, percent
from secateur.report.page import facts_table, figure, table


def recovery_section(recovery: Mapping[str, Any], charts: dict[str, Any]) -> str:
    """One training as HTML; its figures are added to ``charts``."""
    facts = {"trained": recovery["train"], "teacher": recovery["teacher"], **recovery["options"]}
    facts |= {"text": f"{recovery['data']['source']}, {recovery['data']['samples']} windows"}
    return (
        f"<section><h2>Recovery training</h2><p>{escape(summary(recovery))}</p>"
        + figure(quality_chart(recovery), charts, key=_key(recovery))
        + figure(loss_chart(recovery), charts)
        + f"<details><summary>The same in numbers</summary>{table(*measured_table(recovery))}</details>"
        + f"<details><summary>How it was trained</summary>{facts_table(facts)}</details></section>"
    )


def measured_table(recovery: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: the perplexity of the held-out text after so many steps and tokens."""
    spent = recovery["tokens_per_step"]
    rows = [[str(step), format_count(step * spent), format_value(value)] for step, value in recovery["measured"]]
    return ["steps", "tokens", "held-out perplexity"], rows


def summary(recovery: Mapping[str, Any]) -> str:
    """What training gave, in a sentence or two."""
    text = (
        f"{recovery['train']}, {recovery['steps']} steps on {format_count(recovery['tokens'])} tokens: held-out"
        f" perplexity {format_value(recovery['before'])} → {format_value(recovery['after'])}"
    )
    if recovery["teacher_perplexity"] is not None:
        text += f", {format_value(recovery['teacher_perplexity'])} for the dense teacher"
    if recovery["closed"] is not None:
        text += f"; {percent(recovery['closed'])} of the gap in log-perplexity is closed"
    # documents of older versions have none
    return " ".join([f"{text}.", *(f"Note: {note}." for note in recovery.get("notes", ()))])


def quality_chart(recovery: Mapping[str, Any]) -> Chart:
    """Perplexity of the held-out text over tokens spent, and that of the teacher as a line."""
    tokens = [step * recovery["tokens_per_step"] for step, _ in recovery["measured"]]
    values = [value for _, value in recovery["measured"]]
    hover = "%{x:,} tokens: %{y:.4g}<extra></extra>"
    data: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "x": tokens,
            "y": values,
            "line": {"width": 2, "color": KEEP},
            "marker": {"size": 7, "color": KEEP},
            "hovertemplate": hover,
        }
    ]
    if recovery["teacher_perplexity"] is not None:
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "x": [tokens[0], tokens[-1]],
                "y": [recovery["teacher_perplexity"]] * 2,
                "line": {"width": 1.5, "color": REMOVED, "dash": "dash"},
                "hovertemplate": "dense teacher: %{y:.4g}<extra></extra>",
            }
        )
    y = axis("perplexity", zeroline=False, nticks=6)
    low, high = min(values), max(values)
    if low > 0 and high / low > 8:
        y |= {"type": "log", "dtick": 1, "tickformat": "~g"}
    layout = frame(260, axis("tokens spent", zeroline=False, tickformat="~s"), y)
    description = f"Perplexity of text that was held out, from {format_value(values[0])} to {format_value(values[-1])}."
    return Chart("Quality against tokens spent", description, {"data": data, "layout": layout}, has_key=False)


def _key(recovery: Mapping[str, Any]) -> str | None:
    if recovery["teacher_perplexity"] is None:
        return None
    return '<li><i class="keep"></i>trained</li><li><i class="removed"></i>dense teacher</li>'


def loss_chart(recovery: Mapping[str, Any]) -> Chart:
    """The training loss of every step, faint, and its running mean."""
    losses = recovery["losses"]
    steps = list(range(1, len(losses) + 1))
    means, window = running_mean(losses)
    hover = "step %{x}: %{y:.4g}<extra></extra>"
    data = [
        {
            "type": "scatter",
            "mode": "lines",
            "x": steps,
            "y": y,
            "line": {"width": width, "color": colour},
            "opacity": opacity,
            "hovertemplate": hover,
        }
        for y, width, colour, opacity in ((losses, 1, MUTED, 0.5), (means, 2, INK, 1.0))
    ]
    layout = frame(260, axis("step", zeroline=False, tickformat="d"), axis("loss", zeroline=False, nticks=6))
    description = f"{recovery['options']['loss']} of every step, and its mean over {window} steps."
    return Chart("Training loss", description, {"data": data, "layout": layout}, has_key=False)
