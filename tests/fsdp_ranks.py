"""What the ranks of the tests of sharded sparse training do, in a process group (see ``ranks.py``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import secateur as sc
from secateur.errors import UsageError
from sparse_training import STEPS, batch, halves, network, sgd, sparsifier

LAST = 6
"""The step behind which a training is saved."""


def sharded(seed: int = 0) -> Any:
    """The tiny network, all of it sharded; in evaluation mode norms don't see batches, which may be halved."""
    module = network(seed).eval()
    mesh = init_device_mesh("cpu", (2,))
    for layer in (module[0], module[4], module[6]):
        fully_shard(layer, mesh=mesh)
    return fully_shard(module, mesh=mesh)


def train(
    rank: int, module: nn.Module, optimizer: Any, pruned: sc.Sparsifier, first: int = 1, last: int = STEPS
) -> list[dict[str, torch.Tensor]]:
    """Masks after every step, on this rank's half of every batch."""
    seen = []
    for masks in halves(rank, module, optimizer, pruned, first, last):
        seen.append(masks)
        _check_parts(module, optimizer, pruned)
    return seen


def _check_parts(module: nn.Module, optimizer: Any, pruned: sc.Sparsifier) -> None:
    """A rank has the masks of its own rows; what is dead is zero there, and what the optimizer remembers of it."""
    for name, weight in module.named_parameters():
        if name not in pruned._masks:
            continue
        assert isinstance(weight, DTensor) and weight.grad is not None
        mine = pruned._masks[name]
        assert mine.shape == weight.to_local().shape and mine.numel() < weight.numel()
        assert not weight.to_local()[~mine].any()
        assert not optimizer.state[weight]["momentum_buffer"].to_local()[~mine].any()


def job(rank: int, cases: list[tuple[str, dict[str, Any]]], folder: Path) -> None:
    """Train by every method, note masks, and go on from the state of step ``LAST`` in another model."""
    for number, (method, options) in enumerate(cases):
        module = sharded()
        optimizer = sgd(module)
        pruned = sparsifier(module, optimizer, method, sparsity=0.8, **options)
        seen = train(rank, module, optimizer, pruned, last=LAST)
        state = folder / f"{number}-state.safetensors"
        assert pruned.save(state) == state
        weights = {name: p.full_tensor() for name, p in module.state_dict().items() if isinstance(p, DTensor)}
        momenta = {n: optimizer.state[p]["momentum_buffer"].full_tensor() for n, p in module.named_parameters()}
        more = train(rank, module, optimizer, pruned, first=LAST + 1)
        plan = pruned.finish()
        again = resumed(rank, weights, momenta, state, method, options)
        assert all(torch.equal(one[n], two[n]) for one, two in zip(more, again, strict=True) for n in one)
        torch.save(
            {"masks": seen + more, "log": [update.sparsity for update in pruned.log]}, folder / f"{number}-{rank}.pt"
        )
        torch.save({"weights": weights, "momenta": momenta}, folder / f"{number}-step.pt")
        assert all(torch.equal(mask, more[-1][name]) for name, mask in plan.masks.items())
        if rank == 0:
            plan.save(folder / f"{number}-plan")
    refused()


def resumed(rank: int, weights: Any, momenta: Any, state: Path, method: str, options: dict[str, Any]) -> Any:
    """The rest of a training in a model that began as another, from whole tensors and the state on disk."""
    from secateur.train.parts import part_of

    module = sharded(seed=1)
    optimizer = sgd(module)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            weight.to_local().copy_(part_of(weights[name], weight))
            optimizer.state[weight]["momentum_buffer"] = DTensor.from_local(
                part_of(momenta[name], weight), weight.device_mesh, weight.placements, run_check=False,
                shape=weight.shape, stride=weight.stride(),
            )  # fmt: skip
    pruned = sparsifier(module, optimizer, method, sparsity=0.8, resume=state, **options)
    return train(rank, module, optimizer, pruned, first=LAST + 1)


def refused() -> None:
    with pytest.raises(UsageError, match="is sharded over ranks, and masks that are found before training"):
        sc.Sparsifier(sharded(), method="snip", data=[batch(0)])
    with pytest.raises(UsageError, match="traces the network, which is sharded over ranks"):
        sc.Sparsifier(sharded(), method="gmp", units="channels", example_inputs=(batch(0)[0],), end=4, every=2)
