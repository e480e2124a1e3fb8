"""Which dtype the forwards of a training use."""

from __future__ import annotations

from dataclasses import replace

import torch

from secateur.healing.recovery.options import RecoveryOptions
from secateur.observe.precision import compute_dtype

# with fewer tokens less of a step are products, and what is cast in every step is as large
_MANY_TOKENS = 512


def settled(options: RecoveryOptions, device: torch.device) -> RecoveryOptions:
    """The same with the dtype that ``auto`` stands for: bfloat16 where ``device`` multiplies it faster, else float32.

    On a processor it is float32 where a step has few tokens.
    """
    if options.dtype != "auto":
        return options
    few = device.type == "cpu" and options.batch * options.length < _MANY_TOKENS
    dtype = torch.float32 if few else compute_dtype("auto", device)
    return replace(options, dtype=str(dtype).removeprefix("torch."))
