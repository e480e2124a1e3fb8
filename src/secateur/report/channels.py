"""Charts for traced networks, whose groups of channels have names and no layers."""

from __future__ import annotations

import html
from collections import defaultdict
from typing import Any

from secateur.report.charts import INK, KEEP, MUTED, REMOVED, Chart, axis, bars, frame, scores_chart, sides
from secateur.report.report import Report
from secateur.structure.following import CARRIES, MAKES, READS, Way

_COLOURS = {MAKES: KEEP, CARRIES: MUTED, READS: REMOVED}
WAY_KEY = (
    '<li><i class="keep"></i>makes the channels</li><li><i class="carries"></i>carries them on</li>'
    '<li><i class="removed"></i>reads them</li>'
)
_ROW_PIXELS = 46
_MANY = 12


def channels_chart(report: Report) -> Chart:
    """Kept and removed channels of every group, stacked, in the order of the network."""
    names = [name for name in report.groups if name in report.keep]
    after = [len(report.keep[name]) for name in names]
    gone = [report.groups[name] - left for name, left in zip(names, after, strict=True)]
    x = list(range(len(names)))
    shown = [html.escape(name) for name in names]
    data = [
        bars(x, after, "kept", KEEP, "%{customdata}: %{y} kept<extra></extra>") | {"customdata": shown},
        bars(x, gone, "removed", REMOVED, "%{customdata}: %{y} removed<extra></extra>") | {"customdata": shown},
    ]
    layout = frame(220, _group_axis(shown), axis("channels", nticks=5)) | {"barmode": "stack", "bargap": 0.25}
    total, left = sum(after) + sum(gone), sum(after)
    description = (
        f"Of {total:,} channels in {len(names):,} groups {left:,} stay. A channel is everything that leaves with it, "
        "in all the layers that its group couples."
    )
    return Chart("Channels", description, {"data": data, "layout": layout})


def channel_scores(report: Report) -> Chart | None:
    """Scores of the channels, group by group, kept and removed apart; None when no score is finite."""
    groups = {
        number: sides(report.scores[name], set(report.keep[name]))
        for number, name in enumerate(name for name in report.groups if name in report.scores)
    }
    drawn = {number: pair for number, pair in groups.items() if any(pair)}
    return scores_chart("channels", drawn, "group") if drawn else None


def _group_axis(names: list[str]) -> dict[str, Any]:
    if len(names) > _MANY:
        return axis("group, in the order of the network", showgrid=False, showticklabels=False)
    return axis("", showgrid=False, tickvals=list(range(len(names))), ticktext=names)


def way_chart(way: Way) -> Chart:
    """The calls that the channels of one group pass, from top to bottom."""
    places = _placed(way)
    depth = max(y for _, y in places)
    columns = max(x for x, _ in places)
    edges_x: list[float | None] = []
    edges_y: list[float | None] = []
    for start, end in way.links:
        (x0, y0), (x1, y1) = places[start], places[end]
        # sideways between the rows, where no label stands
        edges_x += [x0, x0, x1, x1, None]
        edges_y += [y0, y1 - 0.5, y1 - 0.5, y1, None]
    line = {"color": MUTED, "width": 1.5}
    data: list[dict[str, Any]] = [
        {"type": "scatter", "mode": "lines", "x": edges_x, "y": edges_y, "line": line, "hoverinfo": "skip"}
    ]
    for role, colour in _COLOURS.items():
        chosen = [i for i, stop in enumerate(way.stops) if stop.role == role]
        data.append(
            {
                "type": "scatter",
                "mode": "markers+text",
                "x": [places[i][0] for i in chosen],
                "y": [places[i][1] for i in chosen],
                "text": [_label(way, i) for i in chosen],
                "textposition": "middle right",
                "textfont": {"color": INK, "size": 12},
                "customdata": [_hover(way, i) for i in chosen],
                "hovertemplate": "%{customdata}<extra></extra>",
                "marker": {"color": colour, "size": 12},
                "name": role,
                "cliponaxis": False,
            }
        )
    hidden = {"visible": False, "fixedrange": True}
    layout = frame(
        _ROW_PIXELS * (depth + 1) + 16,
        hidden | {"range": [-0.1, columns + 1.0]},
        hidden | {"range": [depth + 0.5, -0.5]},
    )
    tensors = sum(len(stop.places) for stop in way.stops)
    description = (
        f"Group {way.group}: each of its {way.units:,} channels runs through these {len(way.stops)} calls. To remove "
        f"one is to cut {tensors} dimensions of parameters at once; point at a call to see which."
    )
    return Chart(f"What leaves together: {way.group}", description, {"data": data, "layout": layout})


def _placed(way: Way) -> list[tuple[float, int]]:
    """(column, row) of every stop: below all that it reads, and beside nothing else."""
    before: dict[int, list[int]] = defaultdict(list)
    for start, end in way.links:
        before[end].append(start)
    rows: list[int] = []
    for stop in range(len(way.stops)):
        rows.append(1 + max((rows[s] for s in before[stop]), default=-1))
    after: dict[int, list[int]] = defaultdict(list)
    for start, end in way.links:
        after[start].append(end)
    # what makes channels stands right above its first reader, not at the top
    for stop in reversed(range(len(way.stops))):
        if not before[stop] and after[stop]:
            rows[stop] = min(rows[end] for end in after[stop]) - 1
    columns: list[float] = []
    taken: dict[int, set[int]] = defaultdict(set)
    for stop in range(len(way.stops)):
        # under the first that it reads, or in the next free column
        wanted = int(min((columns[s] for s in before[stop]), default=0))
        if not before[stop] and stop:
            wanted = 1
        while wanted in taken[rows[stop]]:
            wanted += 1
        taken[rows[stop]].add(wanted)
        columns.append(float(wanted))
    return list(zip(columns, rows, strict=True))


def _label(way: Way, number: int) -> str:
    stop = way.stops[number]
    where = html.escape(stop.where)
    return f" <b>{html.escape(stop.operator)}</b>" + (f"<br> {where}" if where else "")


def _hover(way: Way, number: int) -> str:
    stop = way.stops[number]
    return f"{html.escape(stop.operator)} {stop.role} the channels" + "".join(
        f"<br>{html.escape(place)}" for place in stop.places
    )
