"""Laws of labels: what is said is kept, in whatever order it was said."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.structure.units import Labels, Units

SIZES = (2, 3, 4, 6)


class Sayings:
    """A ``Units`` with a list of everything that was said to it, to hold it to."""

    def __init__(self) -> None:
        self.units = Units()
        self.known: list[Labels] = []
        self.joined: list[tuple[Labels, Labels]] = []
        self.pinned: list[Labels] = []
        self.products: list[tuple[Labels, Labels, Labels]] = []

    def fresh(self, size: int) -> None:
        self.known.append(self.units.fresh(size))

    def join(self, a: Labels, b: Labels) -> None:
        size = min(len(a), len(b))
        self.units.join(a[:size], b[:size])
        self.joined.append((a[:size], b[:size]))

    def pin(self, a: Labels) -> None:
        self.units.pin(a, "said so")
        self.pinned.append(a)

    def product(self, a: Labels, b: Labels) -> None:
        size = min(len(a), len(b))
        made = self.units.product(a[:size], b[:size])
        self.products.append((made, a[:size], b[:size]))
        self.known.append(made)

    def grid(self, a: Labels, b: Labels) -> None:
        made = self.units.grid([a, b])
        self.products.append((made, np.repeat(a, len(b)), np.tile(b, len(a))))
        self.known.append(made)

    def split(self, a: Labels, rows: int) -> None:
        if len(a) % rows:
            return
        first, second = self.units.split(a, (rows, len(a) // rows))
        assert (len(first), len(second)) == (rows, len(a) // rows)
        self.products.append((a, np.repeat(first, len(second)), np.tile(second, rows)))
        self.known += [first, second]

    def part(self, a: Labels, seed: int) -> None:
        order = np.random.default_rng(seed).integers(len(a), size=max(1, len(a) // 2))
        self.known.append(a[order])

    def check(self) -> None:
        """Every statement holds for every set of units that could leave."""
        of = self.units.units_of
        for a, b in self.joined:
            assert [of(x) for x in a.tolist()] == [of(x) for x in b.tolist()]
        for labels in self.pinned:
            assert all(of(x) == frozenset() and self.units.reason(x) for x in labels.tolist())
        for made, a, b in self.products:
            for p, x, y in zip(made.tolist(), a.tolist(), b.tolist(), strict=True):
                assert of(p) == of(x) | of(y)

    def check_leaving(self, seed: int) -> None:
        """The same through the tables that cuts are made with, for one set of units that leaves."""
        units = sorted({u for labels in self.known for x in labels.tolist() for u in self.units.units_of(x)})
        flags = self.units.flags(random.Random(seed).sample(units, len(units) // 2))

        def leaves(labels: Labels) -> list[bool]:
            return flags[self.units.table(labels)].any(axis=1).tolist()

        for a, b in self.joined:
            assert leaves(a) == leaves(b)
        for labels in self.pinned:
            assert not any(leaves(labels))
        for made, a, b in self.products:
            assert leaves(made) == [x or y for x, y in zip(leaves(a), leaves(b), strict=True)]


@st.composite
def statements(draw: st.DrawFn) -> list[tuple[str, int, int]]:
    """(what, which labels, with which or how): two numbers that are reduced to what there is when it is said."""
    what = st.sampled_from(["fresh", "join", "join", "join", "pin", "product", "grid", "split", "split", "part"])
    number = st.integers(0, 40)
    return draw(st.lists(st.tuples(what, number, number), min_size=1, max_size=24))


def said(program: list[tuple[str, int, int]]) -> Sayings:
    found = Sayings()
    for size in SIZES:
        found.fresh(size)
    for what, first, second in program:
        a, b = (found.known[-1 - n % len(found.known)] for n in (first, second))
        if what == "fresh":
            found.fresh(SIZES[first % len(SIZES)])
        elif what in ("join", "product"):
            getattr(found, what)(a, b)
        elif what == "grid" and len(a) * len(b) <= 64:
            found.grid(a, b)
        elif what == "split":
            found.split(a, (2, 3, 1)[second % 3])
        elif what == "part":
            found.part(a, second)
        elif what == "pin" and second % 4 == 0:
            found.pin(a[:1])
    return found


@given(statements(), st.integers(0, 1000))
@settings(max_examples=300)
def test_every_statement_holds_whatever_leaves(program, seed):
    found = said(program)
    found.check()
    found.check_leaving(seed)


@given(statements(), st.randoms(use_true_random=False))
@settings(max_examples=300)
def test_the_law_holds_in_every_order(program, order):
    # named products, so that a statement can be said before or after those about its factors
    names, variables, todo = [], {}, []
    units = Units()
    for number in range(8):
        names.append(number)
        variables[number] = units.fresh(3)
    for what, first, second in program:
        todo.append((what, first % 8, second % 8, (first + second) // 8 % 8))
    order.shuffle(todo)
    kept = Sayings()
    kept.units = units
    for what, first, second, third in todo:
        a, b, c = variables[first], variables[second], variables[third]
        if what == "pin":
            kept.pin(a[:1])
        elif what in ("product", "grid", "split"):
            kept.product(a, b)
            kept.join(kept.known[-1], c)
        else:
            kept.join(a, b[::-1])
    kept.check()


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), max_size=12), st.lists(st.integers(0, 7), max_size=2))
def test_without_products_nothing_is_coupled_but_what_was_joined(pairs, pins):
    sayings = [("join", *p) for p in pairs] + [("pin", p, p) for p in pins]
    found = []
    for order in (sayings, sayings[::-1]):
        units = Units()
        labels = [units.fresh(4) for _ in range(8)]
        for what, a, b in order:
            if what == "join":
                units.join(labels[a], np.roll(labels[b], 1) if a < b else labels[b])
            else:
                units.pin(labels[a][:2], "said so")
        sets = [units.units_of(x) for one in labels for x in one.tolist()]
        found.append(
            [[a == b and (a != frozenset() or i == j) for j, b in enumerate(sets)] for i, a in enumerate(sets)]
        )
        found[-1].append([not s for s in sets])
    assert found[0] == found[1]
    assert found[0][:-1] == naive_classes(pairs, found[0][-1])


def naive_classes(pairs: list[tuple[int, int]], stay: list[bool]) -> list[list[bool]]:
    """Which of the 8·4 positions leave together: the transitive closure, one edge at a time."""
    together = np.eye(32, dtype=bool)
    for a, b in pairs:
        for i in range(4):
            j = 4 * b + ((i - 1) % 4 if a < b else i)
            together[4 * a + i, j] = together[j, 4 * a + i] = True
    for _ in range(6):
        together = (together.astype(int) @ together.astype(int)) > 0
    free = ~np.array(stay)
    return (together & free & free[:, None] | np.eye(32, dtype=bool)).tolist()


@pytest.mark.parametrize("shape", [(2, 3), (4, 2), (3, 1), (1, 5), (2, 3, 4), (2, 1, 3)])
def test_split_gives_back_what_grid_merged(shape):
    units = Units()
    factors = [units.fresh(n) if n > 1 else units.fixed(1, "a dimension of size 1") for n in shape]
    parts = units.split(units.grid(factors), shape)
    for merged, found in zip(factors, parts, strict=True):
        assert [units.units_of(x) for x in found] == [units.units_of(x) for x in merged]


def test_split_in_other_places_finds_a_grid_of_three():
    units = Units()
    a, b, c = units.fresh(2), units.fresh(3), units.fresh(2)
    merged = units.grid([a, b, c])
    outer, inner = units.split(merged, (6, 2))
    assert [units.units_of(x) for x in inner] == [{x} for x in c]
    assert [units.units_of(x) for x in outer] == [{x, y} for x in a for y in b]


def test_a_grid_leaves_with_its_row_or_its_column():
    units = Units()
    heads, lanes = units.fresh(2), units.fresh(3)
    merged = units.grid([heads, lanes])
    flags = units.flags([int(heads[1]), int(lanes[0])])
    assert flags[units.table(merged)].any(axis=1).tolist() == [True, False, False, True, True, True]


def test_a_grid_of_pinned_dims_stays_and_one_pinned_factor_leaves_the_other():
    units = Units()
    rows, columns = units.fixed(2, "rows stay"), units.fresh(3)
    assert units.grid([rows, columns]).tolist() == np.tile(columns, 2).tolist()
    both = units.grid([rows, units.fixed(3, "columns stay")])
    assert all(not units.units_of(x) and units.reason(x) for x in both.tolist())


def test_a_pinned_product_pins_its_factors():
    units = Units()
    a, b = units.fresh(1), units.fresh(1)
    units.pin(units.product(a, b), "it is read")
    assert units.reason(int(a[0])) == units.reason(int(b[0])) == "it is read"
    assert not units.units_of(int(a[0])) and not units.units_of(int(b[0]))


def test_a_product_stays_when_its_factors_are_pinned_later():
    units = Units()
    a, b = units.fresh(1), units.fresh(1)
    made = units.product(a, b)
    for labels in (a, b):
        units.pin(labels, "it is read")
    assert not units.units_of(int(made[0])) and units.reason(int(made[0])) == "it is read"


def test_what_is_joined_with_something_pinned_stays_with_its_reason():
    units = Units()
    a, b, c = units.fresh(2), units.fresh(2), units.fresh(2)
    units.join(a, b)
    units.pin(b[:1], "the output")
    units.join(a, c)
    assert [units.reason(int(x)) for x in c] == ["the output", None]


def test_equal_heads_are_told_from_equal_lanes():
    # (heads, lanes) joined with (heads, other lanes): only the lanes follow
    units = Units()
    heads, lanes, other = units.fresh(2), units.fresh(3), units.fresh(3)
    units.join(units.grid([heads, lanes]), units.grid([heads, other]))
    assert units.roots(lanes).tolist() == units.roots(other).tolist()
    assert len({*units.roots(heads).tolist(), *units.roots(lanes).tolist()}) == 5


def test_grids_that_share_no_factor_are_joined_dimension_by_dimension():
    # key heads × repeats with value heads × repeats, as grouped-query attention expands both
    units = Units()
    keys, first, values, second = (units.fresh(n) for n in (3, 2, 3, 2))
    units.join(units.grid([keys, first]), units.grid([values, second]))
    assert units.roots(keys).tolist() == units.roots(values).tolist()
    assert units.roots(first).tolist() == units.roots(second).tolist()
    assert len({*units.roots(keys).tolist(), *units.roots(first).tolist()}) == 5


def test_a_dimension_that_is_no_grid_becomes_one():
    units = Units()
    flat = units.fresh(6)
    rows, columns = units.split(flat, (2, 3))
    assert [units.units_of(x) for x in flat] == [{r, c} for r in rows for c in columns]


def test_tables_follow_what_is_said_after_they_were_asked_for():
    units = Units()
    a, b = units.fresh(2), units.fresh(2)
    before = units.table(a).copy()
    units.join(a, b[::-1])
    assert units.table(a).tolist() == units.table(b[::-1]).tolist()
    units.pin(b, "it is read")
    assert (units.table(a) == -1).all() and (before >= 0).all()
