"""Laws of how a wish becomes the sparsities that matrices get."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.allocate import fit_sparsities, mixed_patterns, part_of, removed_counts
from secateur.errors import BudgetError

shares = st.floats(0, 0.95)
wishes = st.lists(st.floats(-1, 2), min_size=1, max_size=12)
# (rows, columns): where rows lose the same, a matrix loses a multiple of its rows
matrices = st.lists(st.tuples(st.integers(1, 40), st.integers(2, 60)), min_size=1, max_size=12)


@given(wishes, shares, st.randoms(use_true_random=False))
def test_a_wish_is_shifted_until_the_whole_is_met(wish, sparsity, random):
    sizes = [random.randint(1, 1000) for _ in wish]
    found = fit_sparsities(wish, sizes, sparsity)
    assert np.average(found, weights=sizes) == pytest.approx(sparsity, abs=1e-9)
    assert found.min() >= 0 and found.max() <= 0.99
    order = np.argsort(wish, kind="stable")
    assert (np.diff(found[order]) >= 0).all()


@given(wishes, shares, st.randoms(use_true_random=False))
def test_the_order_of_the_parts_changes_nothing(wish, sparsity, random):
    sizes = [random.randint(1, 1000) for _ in wish]
    order = random.sample(range(len(wish)), len(wish))
    found = fit_sparsities(wish, sizes, sparsity)
    again = fit_sparsities([wish[i] for i in order], [sizes[i] for i in order], sparsity)
    assert again == pytest.approx(found[order], abs=1e-9)


def test_a_wish_that_meets_the_whole_stays():
    assert fit_sparsities([0.2, 0.8], [3, 1], 0.35) == pytest.approx([0.2, 0.8])


@given(matrices, shares, st.booleans(), st.randoms(use_true_random=False))
def test_the_weights_removed_are_those_asked_for(shapes, sparsity, by_rows, random):
    sizes = [rows * columns for rows, columns in shapes]
    steps = [rows if by_rows else 1 for rows, _ in shapes]
    wish = fit_sparsities([random.uniform(0, 1) for _ in shapes], sizes, sparsity)
    try:
        counts = removed_counts(wish, sizes, steps, sparsity)
    except BudgetError:
        # rows of two, of which one must stay, can't lose 90 %
        most = sum((size - 1) // step * step for size, step in zip(sizes, steps, strict=True))
        assert most < sparsity * sum(sizes)
        return
    over = sum(counts) - sparsity * sum(sizes)
    parts = list(zip(counts, sizes, steps, strict=True))
    free = [step for count, size, step in parts if (count > 0 if over > 0 else count + step < size)]
    assert abs(over) <= min(free, default=max(steps)) / 2 + 1e-6
    for count, size, step in parts:
        assert 0 <= count < size and count % step == 0


def test_each_matrix_is_near_its_wish():
    counts = removed_counts([0.25, 0.5, 0.75], [1000, 1000, 1000], [1, 1, 1], 0.5)
    assert counts == [250, 500, 750]
    # rows of ten: to the nearest ten, and the rest goes on
    assert removed_counts([0.254, 0.256, 0.5], [1000, 1000, 1000], [10, 10, 1], 1.01 / 3) == [250, 260, 500]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=9), st.integers(1, 7), st.integers(2, 8), st.integers(1, 500))
def test_mixed_patterns_meet_the_pattern_of_the_whole(wish, n, m, size):
    n = min(n, m - 1)
    found = mixed_patterns(wish, [size] * len(wish), n, m)
    assert sum(found) == n * len(wish)
    assert all(0 <= one < m for one in found)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=9), st.integers(1, 3))
def test_parts_of_other_sizes_come_as_near_as_whole_numbers_do(sizes, n):
    found = mixed_patterns([n / 4] * len(sizes), sizes, n, 4)
    # what meets the pattern already is left alone
    assert found == [n] * len(sizes)


@pytest.mark.parametrize(
    ("count", "fraction", "part"),
    [(40, 0.575, 23), (100, 0.29, 29), (3, 0.2, 0), (7, 0.999999, 6), (5120, 1 - 0.8, 1024)],
)
def test_a_part_is_rounded_down_but_not_by_what_floats_lack(count, fraction, part):
    assert part_of(count, fraction) == part
