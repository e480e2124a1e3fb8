"""Masks packed by rows: a rank of a sharded model holds the bits of its own rows and nothing else.

Bits are packed along a row, never across rows, so that a mask is cut into shards at the same rows as its weight:
uint8 [rows, ceil(columns / 8)], least significant bit first, 1 = kept. A weight of more or fewer than two dimensions
counts as its first dimension times the rest.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn import functional as F

from secateur.errors import UsageError


def pack_rows(mask: Tensor) -> Tensor:
    """Boolean mask of a weight → uint8 [rows, ceil(columns / 8)] on the CPU."""
    return pack_bits(mask.cpu().reshape(mask.shape[0], -1))


def pack_bits(mask: Tensor) -> Tensor:
    """[rows, columns] bool → uint8 [rows, ceil(columns / 8)] on the device of the mask."""
    whole = F.pad(mask, (0, -mask.shape[1] % 8)).unflatten(1, (-1, 8)).to(torch.uint8)
    return (whole << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(dim=-1, dtype=torch.uint8)


def unpack_rows(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Inverse of ``pack_rows``: boolean, of ``shape``, on the device of ``packed``."""
    rows, size = packed.shape
    bits = packed[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)
    columns = int(np.prod(shape[1:], dtype=np.int64))
    return (bits & 1).bool().reshape(rows, 8 * size)[:, :columns].reshape(shape)


def packed_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """The shape of the packed mask of a weight of ``shape``."""
    return shape[0], (int(np.prod(shape[1:], dtype=np.int64)) + 7) // 8


def shard_like(packed: Tensor, weight: Tensor) -> Tensor:
    """The part of a tensor with the rows of ``weight``, such as a packed mask, that belongs to this rank's part of it.

    Every rank gives the whole tensor, and nothing is sent. Raises UsageError for a weight that isn't sharded by rows.
    """
    if not isinstance(weight, DTensor):
        return packed.to(weight.device)
    for placement in weight.placements:
        if not (isinstance(placement, Replicate) or (isinstance(placement, Shard) and placement.dim == 0)):
            raise UsageError(f"a mask can follow a weight that is sharded by rows, not one placed as {placement}")
    # None: every rank cuts its own rows out of what it has, and nothing is sent
    return distribute_tensor(packed, weight.device_mesh, weight.placements, src_data_rank=None)


def local(tensor: Tensor) -> Tensor:
    """This rank's part, sharing memory with ``tensor``."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on every rank; all ranks call this together."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def clear_dead(tensor: Tensor, live: Tensor) -> None:
    """Zero this rank's part of ``tensor`` where ``live``, its mask, is False, in place, whatever it holds there."""
    # a product would leave NaN where an entry is inf or NaN
    local(tensor).masked_fill_(~live, 0)


def clear_masked(tensor: Tensor, packed: Tensor) -> None:
    """Zero the masked entries of this rank's part of ``tensor``, in place, whatever they hold."""
    part = local(tensor)
    if part.numel():
        clear_dead(part, unpack_rows(local(packed), tuple(part.shape)).to(part.device))
