"""From a plan to a report: what leaves is removed, and what is zero is zeroed."""

from __future__ import annotations

import pytest

import secateur as sc
from families import make_tiny, tiny_ids
from runs import plan_for
from secateur.report import Metric
from secateur.report.build import build_report
from secateur.report.html import render


def report_of(method, family="llama", **options):
    model = make_tiny(family)
    plan = plan_for(method, model, tiny_ids(), **options)
    return build_report(plan, sc.anatomy(model, heads=plan.head_unit))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(("method", "options"), [("flap", {"heal": "refit"}), ("loraprune", {}), ("tyr", {})])
def test_new_values_of_what_stays_are_no_zeros(method, options, family):
    report = report_of(method, family, sparsity=0.3, **options)
    assert [cut.matrices for cut in report.layers] == [{}] * 3
    assert any(cut.units and cut.sparsity for cut in report.layers)
    report.metrics = [Metric("bytes on disk", "bytes", {"dense": 100.0, "pruned": 80.0})]
    page = render(report)
    assert f"<strong>{method}</strong> removed" in page and "of the parameters of the decoder blocks" in page
    assert "zeros made nothing faster" not in page


def test_masks_are_told_by_matrix():
    report = report_of("wanda", sparsity=0.5, heal="refit")
    assert all(set(cut.matrices.values()) == {0.5} and len(cut.matrices) == 7 for cut in report.layers)
    assert "<strong>wanda</strong> zeroed" in render(report)
