"""Oracles of magnitude pruning, worked out by hand."""

import torch

from secateur.allocate import PerMatrix
from secateur.methods import Target, make_method


def prune(weight, **options):
    target = Target("m", "weight", 0, torch.as_tensor(weight, dtype=torch.float32))
    return make_method("magnitude", options).prune(target, {})[0]


def test_exact_rule_removes_three_of_ten_at_thirty_percent():
    keep = prune([[1.0, 2, 3, 4, 5, 6, 7, 8, 9, 10]], sparsity=0.3)
    assert keep.tolist() == [[False] * 3 + [True] * 7]


def test_published_rule_removes_the_entry_at_the_threshold_too():
    keep = prune([[1.0, 2, 3, 4, 5, 6, 7, 8, 9, 10]], sparsity=0.3, inclusive=True)
    assert keep.tolist() == [[False] * 4 + [True] * 6]


def test_published_rule_removes_21_of_40_at_half():
    keep = prune(torch.arange(1.0, 41).reshape(4, 10), sparsity=0.5, inclusive=True)
    assert int((~keep).sum()) == 21


def test_hand_case_per_matrix_zeroes_both_ones_and_the_published_rule_the_two_as_well():
    weight = [[3.0, 1], [1, 2]]
    assert prune(weight, sparsity=0.5).tolist() == [[True, False], [False, True]]
    assert prune(weight, sparsity=0.5, inclusive=True).tolist() == [[True, False], [False, False]]


def test_sign_does_not_matter():
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(prune(weight, sparsity=0.4), prune(-weight, sparsity=0.4))


def test_global_and_row_scopes_differ_where_rows_differ_in_scale():
    weight = torch.tensor([[0.1, 0.2], [10.0, 20.0]])
    assert prune(weight, sparsity=0.5, scope="row").tolist() == [[False, True], [False, True]]
    assert prune(weight, sparsity=0.5, scope="layer").tolist() == [[False, False], [True, True]]


def test_ties_are_broken_by_position_and_the_count_is_exact():
    assert PerMatrix(0.5).keep(torch.ones(2, 30)).sum() == 30
