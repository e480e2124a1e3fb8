"""Which elements of a row stay, as data, so that the cache can choose by a kernel what torch chooses otherwise."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Largest:
    """The ``count`` elements of a row that are largest in size, and with ``ties`` all that equal the last of them.

    Without, of equals those stay that come first. ``count`` is at least 1 with ties.
    """

    count: int
    ties: bool

    def mask(self, x: Tensor) -> Tensor:
        """Which elements stay along the last dimension of ``x``, bool."""
        size = x.abs()
        if self.ties:
            return size >= size.kthvalue(x.shape[-1] - self.count + 1, dim=-1, keepdim=True).values
        order = size.argsort(dim=-1, descending=True, stable=True)[..., : self.count]
        return torch.zeros_like(x, dtype=torch.bool).scatter(-1, order, True)
