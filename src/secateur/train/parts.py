"""Weights that are sharded over ranks (FSDP2): what a rank holds of them, and the whole of one at a time.

Dead entries are zeroed in this rank's part alone, after every step and without a message. Where masks change, a layer
is gathered, every rank decides the same on the whole of it, and keeps its part of the mask. A tensor that isn't sharded
is its own part and its own whole, so that nobody asks which of both it is.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from secateur.ranks.shards import reshard
from secateur.rowmasks import clear_dead, local, whole

__all__ = ["clear_dead", "local", "part_of", "plain_name", "reshard", "whole", "whole_like"]


def part_of(tensor: Tensor, weight: Tensor) -> Tensor:
    """This rank's part of a whole tensor that is shaped like ``weight``; nothing is sent."""
    if not isinstance(weight, DTensor):
        return tensor
    placed = distribute_tensor(tensor.contiguous(), weight.device_mesh, weight.placements, src_data_rank=None)
    # a view into the whole would keep all of it
    return placed.to_local().clone()


def whole_like(part: Tensor, weight: Tensor) -> Tensor:
    """Inverse of ``part_of``; all ranks call this together."""
    if not isinstance(weight, DTensor):
        return part
    # not every library of ranks sends bits
    sent = part.to(torch.uint8) if part.dtype == torch.bool else part
    placed = DTensor.from_local(
        sent, weight.device_mesh, weight.placements, run_check=False, shape=weight.shape, stride=weight.stride()
    )
    return placed.full_tensor().to(part.dtype)


def plain_name(model: nn.Module) -> str:
    """The name of the class of a module, which FSDP puts another one before."""
    from torch.distributed.fsdp import FSDPModule

    return next(c for c in type(model).__mro__ if not issubclass(c, FSDPModule)).__name__
