"""What the ranks of the tests of sparse training do, in a process group (see ``ranks.py``)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import secateur as sc
from secateur.errors import UsageError
from sparse_training import STEPS, batch, network, sgd, sparsifier


def job(rank: int, method: str, folder: Path) -> None:
    """Train on this rank's half of every batch, and note the masks after every step."""
    # norms see the whole batch, as they don't in two halves: in evaluation mode they see none
    module = DistributedDataParallel(network().eval())
    optimizer = sgd(module)
    pruned = sparsifier(module, optimizer, method, sparsity=0.8)
    masks = []
    for step in range(1, STEPS + 1):
        x, y = batch(step)
        half = slice(8 * rank, 8 * rank + 8)
        optimizer.zero_grad()
        F.cross_entropy(module(x[half]), y[half]).backward()
        optimizer.step()
        pruned.step()
        masks.append(pruned.masks)
    torch.save(masks, folder / f"{rank}.pt")
    sharded_weights_are_refused()


def sharded_weights_are_refused() -> None:
    sharded = nn.Linear(4, 4)
    mesh = init_device_mesh("cpu", (2,))
    sharded.weight = nn.Parameter(distribute_tensor(sharded.weight.detach(), mesh, [Shard(0)]))
    with pytest.raises(UsageError, match="weight is sharded over ranks, and masks that change need whole weights"):
        sc.Sparsifier(sharded, method="erk_random")
