"""Small networks with everything that couples channels, for tests of methods that prune traced modules."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Residual(nn.Module):
    """A residual CNN with a depthwise block, a concatenation and batch norms; 10 classes from 3x12x12."""

    def __init__(self, width: int = 12, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.conv1 = nn.Conv2d(width, 2 * width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(2 * width)
        self.conv2 = nn.Conv2d(2 * width, width, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(width)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.point = nn.Conv2d(width, width, 1)
        self.head = nn.Linear(2 * width, 10)
        for norm in (self.stem[1], self.bn1, self.bn2):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, -0.2, 0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        y = self.point(F.relu(self.depthwise(x)))
        return self.head(torch.cat([x, y], dim=1).mean(dim=(2, 3)))


class Attention(nn.Module):
    """One transformer block with heads, a hard-wired number of them nowhere but in attributes."""

    def __init__(self, dim: int = 32, heads: int = 4, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.num_heads, self.head_dim = heads, dim // heads
        self.embed = nn.Linear(6, dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.head = nn.Linear(dim, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        b, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, -1)
        x = x + self.proj(y)
        return self.head((x + self.down(F.gelu(self.up(x))))[:, 0])
