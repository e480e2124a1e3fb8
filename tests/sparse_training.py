"""A tiny network that is trained with a Sparsifier, for tests of sparse training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc

RAMP = [0, 0.2439, 0.4392, 0.5913, 0.7056, 0.7875, 0.8424, 0.8757, 0.8928, 0.8991, 0.9]
"""Sparsities of the cubic ramp to 0.9 in ten updates."""
STEPS = 12
RHYTHM = {"begin": 2, "end": 8, "every": 2}
"""Updates after the steps 2, 4, 6 and 8, for methods that have any."""


def network(seed: int = 0) -> nn.Sequential:
    """A convolution with a norm, and two linear layers; 8x8 pictures of one channel, 5 classes."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, 20), nn.ReLU(),
            nn.Linear(20, 5),
        )  # fmt: skip


def batch(step: int, size: int = 16) -> tuple[Tensor, Tensor]:
    """The batch of a step: it follows from its number."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(size, 1, 8, 8, generator=generator), torch.randint(0, 5, (size,), generator=generator)


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)


def sparsifier(module: nn.Module, optimizer: Any, method: str, **options: Any) -> sc.Sparsifier:
    """With the rhythm of these tests where the method has one, and with what it may want to look at."""
    known = sc.describe(method)["options"]
    rhythm = {"steps": STEPS, **RHYTHM} if "every" in known else {}
    # enough to see that there are several
    rhythm |= {"rounds": 4} if known.get("rounds", {}).get("default", 1) > 1 else {}
    data, inputs = [batch(0)], (batch(0)[0],)
    return sc.Sparsifier(
        module, optimizer, method=method, **{"data": data, "example_inputs": inputs, **rhythm, **options}
    )


def train(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    pruned: sc.Sparsifier | None,
    first: int = 1,
    last: int = STEPS,
    seen: Callable[[int], Any] = lambda step: None,
) -> None:
    """A plain loop over the steps ``first`` to ``last``; ``seen`` is called after each."""
    for step in range(first, last + 1):
        x, y = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(module(x), y).backward()
        optimizer.step()
        if pruned is not None:
            pruned.step()
        seen(step)


def halves(
    rank: int, module: nn.Module, optimizer: Any, pruned: sc.Sparsifier, first: int = 1, last: int = STEPS
) -> Iterator[dict[str, Tensor]]:
    """Train on this one of two ranks' half of every batch; the masks after every step."""
    for step in range(first, last + 1):
        x, y = batch(step)
        half = slice(8 * rank, 8 * rank + 8)
        optimizer.zero_grad()
        F.cross_entropy(module(x[half]), y[half]).backward()
        optimizer.step()
        pruned.step()
        yield pruned.masks


def same(first: nn.Module, second: nn.Module) -> bool:
    """Whether two modules hold the same bits."""
    theirs = second.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in first.state_dict().items())
