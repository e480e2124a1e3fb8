"""The packed format: one bit per entry and the kept values, so that sparse weights are small on disk.

A packed weight ``<name>`` is two tensors: ``<name>.bitmap`` uint8 [ceil(numel / 8)], row-major, least significant
bit first, 1 = stored; and ``<name>.values`` [number of ones] in the weight's dtype. An entry is left out when its
bits are those of +0.0, so -0.0 and everything else come back bit for bit. See docs/packed-format.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from secateur.errors import ModelLoadError
from secateur.models import modeling_secateur
from secateur.plans import pack_bits

PACKED_VERSION = 1
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def pack(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """(packed state dict, dense shapes of the packed tensors).

    A floating-point matrix is packed when that makes it smaller; everything else is passed on as it is.
    """
    packed: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for name, tensor in state_dict.items():
        parts = _pack_tensor(tensor) if tensor.dim() == 2 and tensor.is_floating_point() else None
        if parts is None:
            packed[name] = tensor
        else:
            packed[f"{name}.bitmap"], packed[f"{name}.values"] = parts
            shapes[name] = list(tensor.shape)
    return packed, shapes


def unpack(packed: Mapping[str, Tensor], shapes: Mapping[str, Any]) -> dict[str, Tensor]:
    """Inverse of ``pack``, bit for bit. Raises ModelLoadError when a packed tensor is missing or malformed."""
    try:
        return modeling_secateur.unpack(packed, {name: tuple(shape) for name, shape in shapes.items()})
    except ValueError as error:
        raise ModelLoadError(str(error)) from None


def _pack_tensor(tensor: Tensor) -> tuple[Tensor, Tensor] | None:
    """(bitmap, values), or None when they take as many bytes as the tensor."""
    # compared and selected as integers of the same width: numpy has no bfloat16, and -0.0 must count
    integers = tensor.detach().cpu().contiguous().view(_INTEGERS[tensor.element_size()]).numpy()
    stored = integers != 0
    packed_bytes = (tensor.numel() + 7) // 8 + int(np.count_nonzero(stored)) * tensor.element_size()
    if packed_bytes >= tensor.numel() * tensor.element_size():
        return None
    return pack_bits(torch.from_numpy(stored)), torch.from_numpy(integers[stored]).view(tensor.dtype)
