"""On a network that was really trained, OBSPA keeps far more accuracy than plain deletion, with or without data."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import secateur as sc

CLASSES, SIDE = 8, 8


def pictures(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy, shifted pictures of one random pattern for each class, and their classes."""
    patterns = torch.randn(CLASSES, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    shifts = torch.randint(-1, 2, (count, 2), generator=generator).tolist()
    shifted = torch.stack([torch.roll(patterns[k], tuple(s), (1, 2)) for k, s in zip(labels, shifts, strict=True)])
    return shifted + 0.9 * torch.randn(shifted.shape, generator=generator), labels


class Network(nn.Module):
    """A small CNN with a residual block."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.conv1, self.norm1 = nn.Conv2d(16, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24)
        self.conv2, self.norm2 = nn.Conv2d(24, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.last = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.head = nn.Linear(32 * 16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(x + self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x))))))
        return self.head(nn.functional.avg_pool2d(self.last(x), 2).flatten(1))


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    module, (x, y) = Network().train(), pictures(2000, seed=1)
    optimizer = torch.optim.Adam(module.parameters(), lr=3e-3)
    torch.manual_seed(0)
    for _ in range(4):
        for chosen in torch.randperm(len(x)).split(100):
            loss = nn.functional.cross_entropy(module(x[chosen]), y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return module.eval()


@torch.no_grad()
def accuracy(module: nn.Module) -> float:
    x, y = pictures(1000, seed=2)
    return float((module(x).argmax(1) == y).float().mean())


def test_obspa_keeps_far_more_than_l1(trained):
    example, (data, _) = torch.zeros(64, 1, SIDE, SIDE), pictures(256, seed=3)

    def left(method: str, **arguments) -> float:
        result = sc.prune(trained, example_inputs=(example,), method=method, sparsity=0.6, budget="macs", **arguments)
        assert result.report.achieved == pytest.approx(0.6, abs=0.05)
        return accuracy(result.model)

    dense = accuracy(trained)
    l1, fitted = left("spa_l1"), left("obspa", data=data.split(64))
    noise = left("obspa", options={"calibration": "noise", "low": -3.0, "high": 3.0})
    print(f"dense {dense:.3f}, spa_l1 {l1:.3f}, obspa {fitted:.3f}, obspa on noise {noise:.3f}")
    assert dense > 0.85
    assert fitted > l1 + 0.2 and noise > l1 + 0.2
