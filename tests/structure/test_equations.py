"""Equations of einsum with every dimension named mean what they meant, and networks with short ones are cut."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cut_networks import check, images, pruned, randomised
from secateur.structure.equations import spelled


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("bi,oi->bo", [(2, 3), (4, 3)]),
        ("...i,oi->...o", [(5, 2, 3), (4, 3)]),
        ("b...c, c d -> b d ...", [(2, 5, 6, 3), (3, 4)]),
        ("...ij,...jk", [(5, 2, 3, 4), (2, 4, 6)]),
        ("ba,a", [(2, 3), (3,)]),
        ("...,...->...", [(2, 3), (3,)]),
        ("...a->a", [(3,)]),
        ("ii->i", [(3, 3)]),
    ],
)
def test_spelled_out_an_equation_means_the_same(equation, shapes):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.rand(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    inputs, output = spelled(equation, [len(shape) for shape in shapes])
    assert [len(letters) for letters in inputs] == [len(shape) for shape in shapes]
    full = f"{','.join(inputs)}->{output}"
    assert "." not in full
    torch.testing.assert_close(torch.einsum(full, *tensors), torch.einsum(equation, *tensors))


def test_an_equation_that_does_not_fit_is_said():
    with pytest.raises(ValueError, match="'ab,bc->ac' doesn't fit operands with 3, 2 dimensions"):
        spelled("ab,bc->ac", [3, 2])


class Short(nn.Module):
    """[batch, tokens, 4] → the same, through 6 hidden features."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.rand(6, 4)), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.einsum("...i,oi->...o", x, self.up).relu())


def test_dimensions_without_names_go_through():
    found = pruned(randomised(Short()), images(2, 3, 4))
    assert {group.units for group in found.anatomy.groups} == {6}
    assert found.trace.unknown == {}
    check(found)


class Volumes(nn.Module):
    """[batch, 2, depth, height, width], sampled at other places, between two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv3d(2, 6, 1), nn.Conv3d(6, 3, 1)
        self.register_buffer("grid", torch.rand(1, 4, 4, 4, 3, dtype=torch.float64) - 0.5)

    def forward(self, x: Tensor) -> Tensor:
        grid = self.grid.expand(len(x), -1, -1, -1, -1)
        return self.second(F.grid_sample(self.first(x).relu(), grid, align_corners=False))


def test_volumes_are_sampled_like_pictures():
    found = pruned(randomised(Volumes()), images(2, 2, 3, 3, 3))
    assert {group.units for group in found.anatomy.groups} == {6}
    check(found)
