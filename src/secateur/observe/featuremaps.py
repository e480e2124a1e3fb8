"""What calibration images tell about feature maps. B images, C channels, H rows, W columns."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.observe.statistics import Accumulator


class MapRanks(Accumulator):
    """Sum over images of the rank of every channel's feature map, [channels] float64, and the number of images.

    Ranks are whole numbers, so that sums are exact and any split of the data gives the same ones.
    """

    def __init__(self) -> None:
        # no dimension, so that it adds to sums on any device
        self.total_C = torch.zeros((), dtype=torch.float64)
        self.images = 0

    def update(self, x_BCHW: Tensor) -> None:
        """Take in one batch. The rank is the number of singular values above max(H, W) * eps times the largest one,
        with the eps of the type in which the maps were computed."""
        rows, columns = x_BCHW.shape[-2:]
        tolerance = max(rows, columns) * torch.finfo(x_BCHW.dtype).eps
        # there are no singular values of half-precision tensors
        whole = x_BCHW if x_BCHW.dtype == torch.float64 else x_BCHW.float()
        ranks_C = torch.linalg.matrix_rank(whole, rtol=tolerance).sum(dim=0, dtype=torch.float64)
        self.total_C = self.total_C.to(ranks_C.device) + ranks_C
        self.images += len(x_BCHW)

    def merge(self, other: MapRanks) -> None:
        """Take in everything that ``other`` has seen."""
        self.total_C = self.total_C + other.total_C
        self.images += other.images

    def mean_C(self) -> Tensor:
        """Average rank of every channel, [channels] float64."""
        return self.total_C / max(self.images, 1)
