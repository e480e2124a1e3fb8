"""Laws of the mask rules."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.allocate import NofM, PerMatrix, PerRow, lowest_of_all, mask_rule, parse_pattern
from secateur.errors import OptionError, UsageError


@st.composite
def scores(draw, columns=None):
    rows, cols = draw(st.integers(1, 6)), draw(st.integers(2, 40) if columns is None else columns)
    levels = draw(st.integers(1, 60))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    # few levels make many ties
    return torch.randint(0, levels, (rows, cols), generator=generator).float()


@given(scores(), st.floats(0, 0.99), st.floats(0, 0.99))
@settings(max_examples=150, deadline=None)
def test_counts_are_exact_and_grow_with_the_sparsity(s, first, second):
    low, high = sorted((first, second))
    for rule, size in ((PerRow, s.shape[1]), (PerMatrix, s.numel())):
        gone = {x: ~rule(x).keep(s) for x in (low, high)}
        for x, mask in gone.items():
            per = mask.sum(dim=1) if rule is PerRow else mask.sum().reshape(1)
            assert (per == int(size * x)).all()
        assert (gone[low] <= gone[high]).all()


@given(scores(), st.floats(0.01, 0.99))
@settings(max_examples=100, deadline=None)
def test_nothing_kept_scores_below_anything_removed(s, sparsity):
    keep = PerRow(sparsity).keep(s)
    best_removed = torch.where(keep, -torch.inf, s).max(dim=1).values
    worst_kept = torch.where(keep, s, torch.inf).min(dim=1).values
    assert (best_removed <= worst_kept).all()


@given(st.data(), st.integers(2, 20))
@settings(max_examples=100, deadline=None)
def test_n_of_m_for_any_n_and_m(data, m):
    n = data.draw(st.integers(1, m - 1))
    s = data.draw(scores(st.integers(1, 5).map(lambda k: k * m)))
    gone = ~NofM(n, m).keep(s)
    runs = gone.reshape(s.shape[0], -1, m)
    assert (runs.sum(dim=2) == n).all()
    split = s.reshape(s.shape[0], -1, m)
    worst_kept = torch.where(runs, torch.inf, split).amin(dim=2)
    assert (torch.where(runs, split, -torch.inf).amax(dim=2) <= worst_kept).all()


@given(scores())
@settings(max_examples=50, deadline=None)
def test_masks_follow_a_permutation_of_the_rows(s):
    order = torch.randperm(s.shape[0], generator=torch.Generator().manual_seed(0))
    assert torch.equal(PerRow(0.5).keep(s[order]), PerRow(0.5).keep(s)[order])


def test_inputs_that_are_no_multiple_are_refused():
    with pytest.raises(UsageError, match="multiple of 4 inputs, this matrix has 6"):
        NofM(2, 4).keep(torch.ones(1, 6))


@pytest.mark.parametrize("text", ["", "2", "4:2", "0:4", "2:2", "a:b", "2:4:8", "-1:4"])
def test_malformed_patterns_are_refused(text):
    with pytest.raises(OptionError, match="N:M"):
        parse_pattern(text)


def test_the_rule_for_the_options():
    assert mask_rule("4:8", 0.1, "row") == NofM(4, 8)
    assert mask_rule("", 0.1, "row") == PerRow(0.1)
    assert mask_rule("", 0.1, "layer", inclusive=True) == PerMatrix(0.1, inclusive=True)


@given(scores(), st.floats(0, 1), st.integers(1, 5), st.booleans())
@settings(max_examples=200, deadline=None)
def test_the_lowest_of_many_parts_are_those_of_one_long_vector(s, sparsity, cuts, signed):
    s = s - s.mean() if signed else s
    count = int(s.numel() * sparsity)
    parts = [part.reshape(1, -1) for part in s.flatten().chunk(cuts)]
    found = torch.cat([part.flatten() for part in lowest_of_all(lambda: iter(parts), count)])
    order = s.flatten().argsort(stable=True)
    wanted = torch.zeros(s.numel(), dtype=torch.bool)
    wanted[order[:count]] = True
    assert torch.equal(found, wanted)


def test_the_lowest_of_many_parts_knows_signs_and_extremes():
    part = torch.tensor([0.0, -0.0, 2**-149, -(2**-149), float("inf"), -float("inf"), 1.0, -1.0])
    (gone,) = lowest_of_all(lambda: iter([part]), 5)
    assert part[gone].tolist() == [0.0, -0.0, -(2**-149), -float("inf"), -1.0]
