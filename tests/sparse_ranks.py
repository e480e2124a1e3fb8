"""What the ranks of the tests of sparse training do, in a process group (see ``ranks.py``)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from sparse_training import halves, network, sgd, sparsifier


def job(rank: int, method: str, folder: Path) -> None:
    """Train on this rank's half of every batch, and note the masks after every step."""
    # norms see the whole batch, as they don't in two halves: in evaluation mode they see none
    module = DistributedDataParallel(network().eval())
    optimizer = sgd(module)
    pruned = sparsifier(module, optimizer, method, sparsity=0.8)
    masks = list(halves(rank, module, optimizer, pruned))
    torch.save(masks, folder / f"{rank}.pt")
