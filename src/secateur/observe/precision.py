"""Which dtype the calibration forwards use."""

from __future__ import annotations

from functools import lru_cache

import torch

from secateur.errors import UsageError
from secateur.timing import seconds

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}

# below this ratio the conversion of weights and activations eats the gain
_WORTH_IT = 1.3


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The torch dtype of that name; ``auto`` is bfloat16 where the machine multiplies it faster, else float32.

    Raises UsageError for another name.
    """
    if name == "auto":
        return torch.bfloat16 if bfloat16_speedup(device) >= _WORTH_IT else torch.float32
    if name not in DTYPES:
        raise UsageError(f"dtype must be auto, {', '.join(DTYPES)}, got '{name}'")
    return DTYPES[name]


@lru_cache
def bfloat16_speedup(device: torch.device) -> float:
    """How many times faster this device multiplies bfloat16 matrices than float32 ones; takes below a second."""
    size = 512 if device.type == "cpu" else 4096
    times = {d: [] for d in (torch.float32, torch.bfloat16)}
    factors = {d: torch.randn(size, size, generator=torch.Generator().manual_seed(0)).to(device, d) for d in times}
    for _ in range(12):
        for dtype, x in factors.items():
            times[dtype].append(_seconds(x))
    best = {dtype: sorted(taken[2:])[len(taken[2:]) // 2] for dtype, taken in times.items()}
    return best[torch.float32] / best[torch.bfloat16]


def _seconds(x: torch.Tensor) -> float:
    def products() -> None:
        for _ in range(4):
            torch.nn.functional.linear(x, x)

    return seconds(products, x.device)
