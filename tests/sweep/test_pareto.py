"""Fronts: what no other point beats."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from secateur.report import Metric
from secateur.sweep.pareto import fronts, undominated
from secateur.sweep.records import Record

PLACES = {"cheap": (1.0, 9.0), "middle": (2.0, 5.0), "worse": (3.0, 6.0), "same": (2.0, 5.0), "best": (4.0, 1.0)}


def record(name, perplexity, disk, decode=None, **more):
    metrics = [
        Metric("perplexity:builtin", "", {name: perplexity}, False),
        Metric("bytes on disk", "bytes", {name: disk}, False),
        Metric("parameters", "", {name: 7.0}, False),
    ]
    if decode:
        metrics.append(Metric("decode", "tokens/s", {name: decode}, True))
    return Record(name, name, metrics=tuple(metrics), **more)


def test_a_front_by_hand():
    assert undominated(PLACES, higher_is_better=False) == ["cheap", "middle", "same", "best"]
    assert undominated(PLACES, higher_is_better=True) == ["cheap"]


@given(st.dictionaries(st.text(), st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12), st.booleans())
def test_every_point_is_on_the_front_or_beaten_by_one_that_is(places, higher):
    front = undominated(places, higher)
    sign = -1 if higher else 1

    def beats(a, b):
        (cost_a, good_a), (cost_b, good_b) = places[a], places[b]
        return cost_a <= cost_b and sign * good_a <= sign * good_b and places[a] != places[b]

    for name in places:
        assert (name in front) != any(beats(other, name) for other in front)


def test_costs_that_are_equal_everywhere_have_no_front():
    dense, points = record("dense", 10.0, 100.0, 5.0), [record("a", 12.0, 80.0, 10.0), record("b", 15.0, 90.0, 4.0)]
    found = {front.cost.name: front for front in fronts(dense, points)}
    assert list(found) == ["latency", "bytes on disk"]
    assert found["latency"].places == {"dense": (200.0, 10.0), "a": (100.0, 12.0), "b": (250.0, 15.0)}
    assert found["latency"].best == ("a", "dense") and found["bytes on disk"].best == ("a", "dense")


def test_failed_points_and_missing_qualities_are_left_out():
    failed = Record("x", "x", error="no")
    assert [f.best for f in fronts(record("dense", 10.0, 100.0), [failed, record("a", 9.0, 80.0)])] == [("a",)]
    only_size = Record("a", "a", metrics=(Metric("parameters", "", {"a": 3.0}, False),))
    assert fronts(None, [only_size]) == [] and fronts(None, [failed]) == []
