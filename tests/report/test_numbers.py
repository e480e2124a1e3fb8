"""Numbers as people read them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from secateur.report import Metric
from secateur.report.numbers import (
    change_from,
    footnotes,
    format_change,
    format_value,
    metric_value,
    ranges,
    short_names,
    verdict,
)


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (134_515_008, "parameters", "134.5 M"),
        (999_960, "parameters", "1.0 M"),
        (1_234, "parameters", "1,234"),
        (538_060_032, "bytes", "538 MB"),
        (53_806_003, "bytes", "53.8 MB"),
        (999_999_999, "bytes", "1.0 GB"),
        (512, "bytes", "512 B"),
        (23_040, "bytes/token", "23.0 kB/token"),
        (25.61, "", "25.6"),
        (5.678, "", "5.68"),
        (0.04567, "s", "0.0457 s"),
        (1234.4, "tok/s", "1,234 tok/s"),
        (999.7, "tok/s", "1,000 tok/s"),
        (0.5, "fraction", "50.0 %"),
        (2_500_000.0, "", "2.5 M"),
        (0.0, "ms", "0 ms"),
        (-3.25, "ms", "−3.25 ms"),
        (float("inf"), "", "inf"),
        (float("nan"), "bytes", "NaN"),
    ],
)
def test_values(value: float, unit: str, text: str) -> None:
    assert format_value(value, unit) == text


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (None, "–"),
        (-0.2, "−20.0 %"),
        (0.473, "+47.3 %"),
        (1.0, "×2"),
        (17.86, "×18.9"),
        (0.0001, "0.0 %"),
        (float("inf"), "–"),
    ],
)
def test_changes(change: float | None, text: str) -> None:
    assert format_change(change) == text


@pytest.mark.parametrize(
    ("pruned", "higher_is_better", "text"),
    [(2.0, True, "better"), (2.0, False, "worse"), (0.5, False, "better"), (2.0, None, ""), (1.0, True, "")],
)
def test_verdict(pruned: float, higher_is_better: bool | None, text: str) -> None:
    metric = Metric("m", "", {"dense": 1.0, "pruned": pruned}, higher_is_better)
    assert verdict(change_from(metric, "dense", "pruned"), higher_is_better) == text


def test_verdict_of_nan_is_open() -> None:
    assert verdict(float("nan"), higher_is_better=True) == ""


def test_without_the_dense_model_there_is_no_change() -> None:
    metric = Metric("m", "", {"first": 1.0, "second": 2.0})
    assert change_from(metric, "dense", "second") is None
    assert change_from(metric, "first", "second") == 1.0


def test_the_change_of_interleaved_repeats_is_the_median_of_their_ratios() -> None:
    """Another program that slows down whole repeats falls out, and can't fall on one model and not on the other."""
    repeats = {"dense": [10.0, 2.0, 10.0, 4.0, 2.0], "pruned": [20.0, 4.0, 20.0, 20.0, 20.0]}
    metric = Metric("decode", "tokens/s", {"dense": 4.0, "pruned": 20.0}, True, repeats=repeats)
    # ratios 2, 2, 2, 5, 10, where the medians alone are 4 and 20
    assert metric.change("pruned") == 1.0 and metric.change("dense") == 0.0
    assert replace(metric, repeats={}).change("pruned") == 4.0
    assert replace(metric, repeats={"pruned": repeats["pruned"]}).change("pruned") == 4.0


def test_a_unit_that_the_name_says_is_left_out() -> None:
    assert metric_value(Metric("perplexity builtin", "perplexity", {"a": 25.61}), "a") == "25.6"
    assert metric_value(Metric("decode", "tok/s", {"a": 25.61}), "a") == "25.6 tok/s"


def test_footnotes_are_numbered_in_order_and_shared() -> None:
    metrics = [Metric(str(i), "", {}, protocol=p) for i, p in enumerate(["b", "", "a", "b"])]
    assert footnotes(metrics) == {"b": 1, "a": 2}


@pytest.mark.parametrize(
    ("numbers", "text"), [([], ""), ([3], "3"), ([0, 1, 2, 5, 8, 9], "0–2, 5, 8–9"), (range(30), "0–29")]
)
def test_ranges(numbers: list[int], text: str) -> None:
    assert ranges(numbers) == text


def test_short_names_stay_unique() -> None:
    names = ["attn.c_attn", "attn.c_proj", "mlp.c_proj", "c_fc"]
    assert list(short_names(names).values()) == ["c_attn", "attn.c_proj", "mlp.c_proj", "c_fc"]
