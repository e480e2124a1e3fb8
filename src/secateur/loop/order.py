"""Which examples a step sees, and its random numbers: both follow from the seed and the number of the step."""

from __future__ import annotations

import torch
from torch import Tensor

# what seeds and numbers of steps are mixed by
_PRIME = 1_000_003


def examples_of(step: int, batch: int, available: int, seed: int) -> Tensor:
    """The examples of a step, [batch] int64: every one once in an order of its own, then all of them in another."""
    places = range(step * batch, (step + 1) * batch)
    orders: dict[int, Tensor] = {}
    for epoch in {place // available for place in places}:
        generator = torch.Generator().manual_seed(seed * _PRIME + epoch)
        orders[epoch] = torch.randperm(available, generator=generator)
    return torch.stack([orders[place // available][place % available] for place in places])


def step_seed(step: int, seed: int) -> int:
    """What the random numbers of a step begin with."""
    return seed * _PRIME + step
