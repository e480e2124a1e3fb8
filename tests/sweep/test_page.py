"""``sweep.html``: it stands alone, escapes what it shows, and holds every point."""

from __future__ import annotations

import json
import re

import pytest

from secateur.report import Metric
from secateur.sweep.page import render
from secateur.sweep.pareto import fronts
from secateur.sweep.records import Record
from secateur.sweep.results import columns, results_csv
from secateur.sweep.runner import Results
from secateur.sweep.spec import make_sweep

pytest.importorskip("plotly")


def record(name, perplexity, disk, **values):
    metrics = (
        Metric("perplexity:builtin", "", {name: perplexity}, False, "2 windows <of> text"),
        Metric("bytes on disk", "bytes", {name: disk}, False),
    )
    return Record(name, name, values, 0.3, metrics)


@pytest.fixture
def results():
    sweep = make_sweep({"model": "<b>m", "sweep": {"grid": {"method": ["wanda", "flap"], "sparsity": [0.3, 0.5]}}}, "r")
    points = [record(p.name, 20.0 + 100 * i, 1e6 - 1e5 * i, **p.values) for i, p in enumerate(sweep.points[:3])]
    failed = Record(sweep.points[3].name, "k", sweep.points[3].values, error="<script>", attempts=3)
    return Results(sweep, record("dense", 10.0, 2e6), [*points, failed], ["a & b"])


def charts_of(document):
    return json.loads(re.search(r'id="charts">(.*?)</script>', document, re.S)[1])


def test_the_page_holds_every_point_and_nothing_from_elsewhere(results):
    document = render(results)
    (chart,) = charts_of(document).values()
    line, *marks = chart["data"]
    texts = [text for trace in marks for text in trace["text"]]
    assert len(texts) == 4 and all(any(p.name in text for text in texts) for p in results.points[:3])
    # the staircase goes through the front, cheapest first: all four here
    assert line["x"] == [8e5, 9e5, 1e6, 2e6] and line["y"] == [220.0, 120.0, 20.0, 10.0]
    assert chart["layout"]["yaxis"]["type"] == "log"
    body = document[: document.index('<script type="application/json"')]
    assert not re.search(r"(src|href)=[\"']?http", body) and "url(" not in body and "@import" not in body
    assert "Content-Security-Policy" in body and "prefers-color-scheme: dark" in body


def test_colours_are_names_that_the_style_defines_for_light_and_dark(results):
    document = render(results)
    style = document[document.index("<style>") : document.index("</style>")]
    used = set(re.findall(r"var\((--[a-z]+)\)", document.replace(style, "")))
    assert {"--one", "--two", "--ink"} <= used
    # once for light and once for dark
    assert [name for name in used if style.count(f"{name}:") != 2] == []
    symbols = [trace["marker"]["symbol"] for trace in charts_of(document)["chart-1"]["data"][1:]]
    assert len(set(symbols)) == len(symbols) == 3


def test_what_came_from_outside_is_escaped(results):
    document = render(results)
    body = document[: document.index('<script type="application/json"')]
    assert "&lt;b&gt;m" in body and "<b>m" not in body
    assert "&lt;script&gt; (3 attempts)" in body and "2 windows &lt;of&gt; text" in body and "a &amp; b" in body


def test_without_a_front_the_page_says_why(results):
    results.points = results.points[3:]
    results.dense = None
    assert "There is none" in render(results)


def test_what_is_no_finite_number_is_not_drawn(results):
    results.points[1] = record("wanda-sparsity=0.5", float("inf"), 8e5, method="wanda", sparsity=0.5)
    results.points[2] = record("flap-sparsity=0.3", float("nan"), 7e5, method="flap", sparsity=0.3)
    (front,) = fronts(results.dense, results.points)
    assert set(front.places) == {"dense", "wanda-sparsity=0.3"}
    assert "wanda-sparsity=0.5" not in str(charts_of(render(results)))
    # as it is when the sweep goes on from its journal
    again = Record.from_dict(json.loads(json.dumps(results.points[1].to_dict())))
    assert again.metric("perplexity:builtin") is results.points[1].metric("perplexity:builtin") is None


def test_columns_name_what_varies(results):
    header, rows = columns(results)
    assert header == ["method", "sparsity", "removed", "perplexity", "on disk", "best"]
    assert rows[0] == ["dense", "", "30.0 %", "10", "2.0 MB", "●"]
    assert rows[1] == ["wanda", "0.3", "30.0 %", "20", "1.0 MB", "●"]
    assert rows[4] == ["flap", "0.5", "failed", "–", "–", ""]


def test_csv_holds_plain_numbers_and_leaves_the_rest_empty(results):
    lines = results_csv(results).splitlines()
    assert lines[0] == "point,method,sparsity,status,removed,perplexity:builtin,bytes on disk,attempts,seconds,error"
    assert lines[2].startswith("wanda-sparsity=0.3,wanda,0.3,done,0.3,20.0,1000000.0,1,")
    assert lines[-1] == "flap-sparsity=0.5,flap,0.5,failed,,,,3,0.0,<script>"
