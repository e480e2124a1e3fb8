"""Plotly figures of a report, as plain dictionaries; colours are names of the style sheet, resolved when drawn."""

from __future__ import annotations

import html
import itertools
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from secateur.report.numbers import short_names
from secateur.report.report import LayerCut, Report

KEEP, REMOVED, INK, MUTED, RULE, RAISED = (
    f"var(--{name})" for name in ("keep", "removed", "ink", "muted", "rule", "raised")
)
KIND_WORDS = {"kv_head": "key-value heads", "head": "query heads", "neuron": "FFN neurons", "layer": "layers"}
_MOST_POINTS = 16
"""groups of up to so many units are drawn unit by unit, larger ones as boxes"""
_WIDE_RANGE = 50.0
"""positive scores that span more than this factor get a logarithmic axis"""
_SMOOTHED = 0.05
"""fraction of the steps over which a loss is averaged"""
_NAMED_LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


@dataclass(frozen=True)
class Chart:
    """A plotly figure with its title, what it shows in words, and whether kept and removed need a key."""

    title: str
    description: str
    figure: dict[str, Any]
    has_key: bool = True


def units_chart(layers: Sequence[LayerCut], kind: str) -> Chart:
    """Kept and removed units of every layer, stacked."""
    cuts = [(cut.layer, *cut.units[kind]) for cut in layers if kind in cut.units]
    x = [layer for layer, _, _ in cuts]
    before = [old for _, old, _ in cuts]
    after = [new for _, _, new in cuts]
    gone = [old - new for old, new in zip(before, after, strict=True)]
    word = KIND_WORDS.get(kind, kind)
    data = [
        bars(x, after, "kept", KEEP, "layer %{x}: %{y} kept<extra></extra>"),
        bars(x, gone, "removed", REMOVED, "layer %{x}: %{y} removed<extra></extra>"),
    ]
    y = axis("", range=[0, max(before, default=1) * 1.02]) | _few_ticks(max(before, default=1))
    layout = frame(180, layer_axis(x), y) | {"barmode": "stack", "bargap": 0.25}
    total, left = sum(before), sum(after)
    description = f"Of {total:,} {word} {left:,} stay and {total - left:,} leave; per layer {_span(after)} are kept."
    return Chart(word[0].upper() + word[1:], description, {"data": data, "layout": layout})


def sparsity_chart(layers: Sequence[LayerCut]) -> Chart:
    """Heat map of the fraction of zeros, matrices × layers."""
    names = list(dict.fromkeys(name for cut in layers for name in cut.matrices))
    z = [[cut.matrices.get(name) for cut in layers] for name in names]
    values = [value for row in z for value in row if value is not None]
    low, high = min(values), max(values)
    flat = high - low < 0.005
    short = short_names(names)
    data = [
        {
            "type": "heatmap",
            "x": [cut.layer for cut in layers],
            "y": [html.escape(short[name]) for name in names],
            "z": z,
            "zmin": 0 if flat else low,
            "zmax": 1 if flat else high,
            "xgap": 1,
            "ygap": 1,
            "colorscale": [[0, RAISED], [1, REMOVED]],
            "hovertemplate": "layer %{x}, %{y}: %{z:.2%} zeros<extra></extra>",
            "colorbar": _colorbar(),
        }
    ]
    y = axis("", autorange="reversed", showgrid=False, ticklabelstandoff=4)
    layout = frame(100 + 24 * len(names), layer_axis([cut.layer for cut in layers]), y)
    description = (
        f"Every matrix of every layer has {_percent(statistics.fmean(values))} zeros."
        if flat
        else f"Between {_percent(low)} and {_percent(high)} of the entries of a matrix are zero."
    )
    return Chart("Fraction of zeros", description, {"data": data, "layout": layout}, has_key=False)


def score_charts(report: Report) -> list[Chart]:
    """One chart for every kind of group: its finite scores over the layers, kept and removed apart."""
    kinds: dict[str, dict[int, tuple[list[float], list[float]]]] = {}
    for name, scores in report.scores.items():
        kept = set(report.keep.get(name, range(len(scores))))
        found = _NAMED_LAYER.search(name)
        if found is None:
            # the units of such a group are the layers themselves
            for unit, score in enumerate(scores):
                kinds.setdefault(name, {})[unit] = sides([score], {0} if unit in kept else set())
        else:
            kind = f"{name[: found.start()]}.{name[found.end() :]}".strip(".").removeprefix("layers.")
            kinds.setdefault(kind, {})[int(found[1])] = sides(scores, kept)
    drawn = {kind: {n: pair for n, pair in sorted(layers.items()) if any(pair)} for kind, layers in kinds.items()}
    return [scores_chart(kind, layers) for kind, layers in drawn.items() if layers]


def sides(scores: Sequence[float], kept: set[int]) -> tuple[list[float], list[float]]:
    """The finite scores of kept and of removed units."""
    finite = [(unit in kept, score) for unit, score in enumerate(scores) if math.isfinite(score)]
    return [score for stays, score in finite if stays], [score for stays, score in finite if not stays]


def scores_chart(kind: str, layers: Mapping[int, tuple[list[float], list[float]]], word: str = "layer") -> Chart:
    """Scores of kept and removed units over the layers, or over what ``word`` says that the numbers count."""
    everything = [s for stay, leave in layers.values() for s in (*stay, *leave)]
    few = max(len(stay) + len(leave) for stay, leave in layers.values()) <= _MOST_POINTS
    draw = _points if few else _boxes
    parts = (("kept", KEEP, 0), ("removed", REMOVED, 1))
    data = [draw({n: pair[side] for n, pair in layers.items()}, name, colour, word) for name, colour, side in parts]
    logarithmic = min(everything) > 0 and max(everything) / min(everything) > _WIDE_RANGE
    y = axis("score", zeroline=False)
    y |= {"type": "log", "dtick": 1, "tickformat": "~g"} if logarithmic else {"nticks": 6}
    x = layer_axis(list(layers), word) | {"range": [min(layers) - 0.7, max(layers) + 0.7]}
    layout = frame(260, x, y) | {"boxmode": "overlay"}
    how = "every unit is a dot" if few else "boxes hold the middle half, whiskers 5 % to 95 %"
    scale = ", logarithmic scale" if logarithmic else ""
    gone = sum(len(leave) for _, leave in layers.values())
    description = f"Higher scores are kept first; {gone:,} of {len(everything):,} units were removed ({how}{scale})."
    return Chart(f"Scores: {kind}", description, {"data": data, "layout": layout})


def bars(x: list[int], y: list[int], name: str, colour: str, hover: str) -> dict[str, Any]:
    """The bars of one colour of a chart."""
    return {
        "type": "bar",
        "x": x,
        "y": y,
        "name": name,
        "marker": {"color": colour, "line": {"width": 0}},
        "hovertemplate": hover,
    }


def _points(values: Mapping[int, Sequence[float]], name: str, colour: str, word: str) -> dict[str, Any]:
    pairs = [(layer, _short(score)) for layer, scores in values.items() for score in scores]
    symbol = "circle" if name == "kept" else "circle-open"
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [layer for layer, _ in pairs],
        "y": [score for _, score in pairs],
        "name": name,
        "marker": {"color": colour, "size": 7, "symbol": symbol, "line": {"width": 2, "color": colour}},
        "hovertemplate": f"{word} %{{x}}: %{{y:.3g}}, {name}<extra></extra>",
    }


def _boxes(values: Mapping[int, Sequence[float]], name: str, colour: str, word: str) -> dict[str, Any]:
    layers = [layer for layer, scores in values.items() if scores]
    ordered = [sorted(values[layer]) for layer in layers]
    quantiles = [[_short(_quantile(scores, q)) for scores in ordered] for q in (0.05, 0.25, 0.5, 0.75, 0.95)]
    keys = ("lowerfence", "q1", "median", "q3", "upperfence")
    return {
        "type": "box",
        "x": layers,
        **dict(zip(keys, quantiles, strict=True)),
        "name": name,
        "width": 0.7,
        "line": {"width": 1.2, "color": colour},
        "fillcolor": colour.replace(")", "soft)"),
        "whiskerwidth": 0,
    }


def _quantile(ordered: Sequence[float], q: float) -> float:
    position = q * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"


def _span(values: Sequence[int]) -> str:
    low, high = min(values, default=0), max(values, default=0)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _few_ticks(most: int) -> dict[str, Any]:
    return {"dtick": 1} if most <= 4 else {"nticks": 4}


def _colorbar() -> dict[str, Any]:
    return {
        "orientation": "h",
        "thickness": 8,
        "len": 0.5,
        "x": 0,
        "xanchor": "left",
        "y": 1.02,
        "yanchor": "bottom",
        "tickformat": ".0%",
        "nticks": 4,
        "outlinewidth": 0,
    }


def running_mean(values: Sequence[float]) -> tuple[list[float], int]:
    """(mean of every value and of those before it, for the eye; of how many at most)."""
    window = max(1, round(_SMOOTHED * len(values)))
    sums = [0.0, *itertools.accumulate(values)]
    return [(sums[i] - sums[max(0, i - window)]) / min(i, window) for i in range(1, len(values) + 1)], window


def axis(title: str, **more: Any) -> dict[str, Any]:
    """An axis in the colours of the page; ``more`` are attributes of plotly."""
    return {
        "title": {"text": title, "standoff": 8},
        "fixedrange": True,
        "gridcolor": RULE,
        "zerolinecolor": RULE,
        "linecolor": RULE,
        "automargin": True,
        "ticks": "",
        **more,
    }


def layer_axis(layers: Sequence[int], word: str = "layer") -> dict[str, Any]:
    """An axis of layers, or of what ``word`` says that the numbers count."""
    # left alone, plotly marks halves between a few layers
    ticks = {"dtick": 1} if len(layers) <= 10 else {}
    return axis(word, showgrid=False, zeroline=False, tickformat="d", **ticks)


def frame(height: int, xaxis: dict[str, Any], yaxis: dict[str, Any]) -> dict[str, Any]:
    """The layout of a chart that is ``height`` pixels high."""
    return {
        "height": height,
        "margin": {"l": 8, "r": 8, "t": 8, "b": 8},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": MUTED},
        "hoverlabel": {"bgcolor": RAISED, "bordercolor": RULE, "font": {"color": INK}},
        "showlegend": False,
        "dragmode": False,
        "xaxis": xaxis,
        "yaxis": yaxis,
    }
