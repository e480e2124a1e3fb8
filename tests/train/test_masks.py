"""Packing masks by rows, and laying them on tensors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur.rowmasks import clear_masked, pack_rows, packed_shape, unpack_rows

SHAPES = st.lists(st.integers(1, 19), min_size=1, max_size=3).map(tuple)


@given(SHAPES, st.integers(0, 2**16))
def test_packing_is_undone_by_unpacking(shape: tuple[int, ...], seed: int) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = pack_rows(mask)
    assert packed.dtype == torch.uint8 and tuple(packed.shape) == packed_shape(shape)
    assert torch.equal(unpack_rows(packed, shape), mask)


@given(st.integers(2, 19), st.integers(1, 19), st.integers(1, 18))
def test_rows_of_a_packed_mask_are_the_packed_rows(rows: int, columns: int, first: int) -> None:
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(rows * columns)) < 0.5
    first = min(first, rows - 1)
    assert torch.equal(pack_rows(mask)[first:], pack_rows(mask[first:]))


def test_bits_are_least_significant_first() -> None:
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[0, 0] = mask[1, 3] = mask[1, 8] = True
    assert pack_rows(mask).tolist() == [[1, 0], [8, 1]]


@pytest.mark.parametrize("value", [3.0, -0.0, float("nan"), float("inf")])
def test_clearing_leaves_plain_zeros_whatever_was_there(value: float) -> None:
    mask = torch.tensor([[True, False, True]])
    tensor = torch.full((1, 3), value)
    kept = tensor.clone()
    clear_masked(tensor, pack_rows(mask))
    assert tensor[0, 1] == 0 and not torch.signbit(tensor[0, 1])
    torch.testing.assert_close(tensor[mask], kept[mask], rtol=0, atol=0, equal_nan=True)
