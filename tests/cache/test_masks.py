"""Masks of the whole text, looked up where something stays."""

from __future__ import annotations

import pytest
import torch

from secateur.cache.attention import Visible, left_padding
from secateur.errors import UnsupportedModelError

POSITIONS = torch.tensor([[[0, 2, 5]], [[1, 3, 5]]])


def test_one_new_token_sees_everything_without_a_mask():
    assert Visible(None, 1, 6).at(POSITIONS) is None


def test_new_tokens_see_up_to_themselves():
    seen = Visible(None, 2, 6).at(POSITIONS)
    assert seen[0, 0].tolist() == [[True, True, False], [True, True, True]]


def test_a_mask_of_padding_is_looked_up_and_stays_causal():
    padding = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
    assert Visible(padding, 1, 6).at(POSITIONS)[:, 0, 0].tolist() == [[True] * 3, [False, True, True]]
    seen = Visible(padding, 2, 6).at(POSITIONS)
    assert seen[1, 0].tolist() == [[False, True, False], [False, True, True]]
    assert torch.equal(Visible(padding, 2, 6).at(POSITIONS[1:], slice(1, 2)), seen[1:])


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_mask_of_four_dimensions_is_looked_up_as_it_is(dtype):
    mask = torch.rand(2, 1, 2, 6).gt(0.5) if dtype == torch.bool else torch.rand(2, 1, 2, 6)
    seen = Visible(mask, 2, 6).at(POSITIONS)
    for b in range(2):
        assert torch.equal(seen[b, 0], mask[b, 0][:, POSITIONS[b, 0]])


def test_padding_is_counted_in_every_kind_of_mask():
    flat = torch.tensor([[1, 1, 1], [0, 0, 1]])
    square = flat.bool()[:, None, None].expand(2, 1, 3, 3)
    added = torch.zeros(2, 1, 3, 3).masked_fill(~square, torch.finfo(torch.float32).min)
    assert [left_padding(mask, 2, 3) for mask in (flat, square, added)] == [[0, 2]] * 3
    assert left_padding(torch.ones(2, 3), 2, 3) is None and left_padding(None, 2, 3) is None
    with pytest.raises(UnsupportedModelError, match="padded on the left"):
        left_padding(torch.tensor([[1, 0, 1]]), 1, 3)
