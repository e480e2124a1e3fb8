"""A tiny network that is trained in rounds, for tests of lotteries."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from secateur.rounds import Run
from sparse_training import batch

STEPS = 8


def network() -> nn.Module:
    """A convolution with a norm, and two linear layers; 8x8 pictures of one channel, 5 classes."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 16), nn.ReLU(),
        nn.Linear(16, 5),
    )  # fmt: skip


def train(model: nn.Module, run: Run) -> dict[str, float]:
    """Momentum, weight decay and a schedule, all of which could wake dead weights; the last rate and loss."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 0.5 * (1 + math.cos(math.pi * s / STEPS)))
    run.forward(scheduler)
    first = scheduler.get_last_lr()[0]
    loss = torch.zeros(())
    model.train()
    for step in run.steps(STEPS):
        x, y = batch(1000 * (run.seed % 997) + step)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        scheduler.step()
    return {"first_rate": first, "loss": loss.item()}


def accuracy(model: nn.Module) -> dict[str, float]:
    x, y = batch(7, size=64)
    assert not model.training
    return {"accuracy": 100 * float((model(x).argmax(1) == y).float().mean())}


def same_numbers(first: Any, second: Any) -> bool:
    """Whether two lists of entries say the same to the bit."""
    return [e.__dict__ for e in first] == [e.__dict__ for e in second]
