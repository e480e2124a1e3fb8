"""Random numbers that follow from a seed, while those of the caller stay as they are."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def apart() -> Iterator[None]:
    """Whatever is drawn within the block, generators of Python, NumPy and torch are then where they were before."""
    python, numpy = random.getstate(), np.random.get_state()
    # named, since torch warns where it has to think of all GPUs by itself; none of them has drawn before it is in use
    gpus = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=gpus):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """All that is drawn within the block follows from the seed; afterwards generators are where they were."""
    with apart():
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        yield
