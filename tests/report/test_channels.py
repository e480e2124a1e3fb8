"""The report of a traced network: widths by group, and the picture of what leaves together."""

import json
from itertools import combinations

import pytest
import torch

import secateur as sc
from channel_networks import Residual
from secateur.report.channels import channel_scores, channels_chart, way_chart
from secateur.report.html import render
from secateur.structure.following import Stop, Way


@pytest.fixture(scope="module")
def report():
    module = Residual().eval()
    return sc.prune(module, example_inputs=(torch.randn(1, 3, 12, 12),), method="spa_l1", sparsity=0.4).report


def test_widths_by_group(report):
    kept, removed = channels_chart(report).figure["data"]
    assert kept["customdata"] == list(report.groups)
    assert kept["y"] == [len(units) for units in report.keep.values()]
    assert [a + b for a, b in zip(kept["y"], removed["y"], strict=True)] == list(report.groups.values())
    assert sum(removed["y"]) > 0


def test_scores_by_group(report):
    chart = channel_scores(report)
    assert chart is not None and chart.figure["data"][0]["name"] == "kept"
    report_without = type(report)(**{**vars(report), "scores": {}})
    assert channel_scores(report_without) is None


def test_the_picture_of_a_group(report):
    (way,) = report.ways
    data = way_chart(way).figure["data"]
    places = [(x, y) for part in data[1:] for x, y in zip(part["x"], part["y"], strict=True)]
    assert len(places) == len(way.stops)
    assert all(a != b for a, b in combinations(places, 2)), "two calls stand on one another"
    text = json.dumps(data)
    assert "conv2.weight[0]" in text and "batch_norm" in text


def test_names_are_escaped():
    way = Way("<g>", 3, (Stop("<op>", "<where>", "makes", ("<p>[0]",)), Stop("read", "", "reads")), ((0, 1),))
    text = json.dumps(way_chart(way).figure)
    assert "&lt;op&gt;" in text and "<op>" not in text and "<where>" not in text and "<p>" not in text


def test_the_page(report):
    page = render(report)
    assert "of the parameters; asked for: 40.0 % of the parameters" in page
    assert "What leaves together: stem.0" in page and "decoder blocks" not in page
    assert page.count('class="chart"') == 3
