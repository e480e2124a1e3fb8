"""Training with masks: pruning while a network is trained, and training a cut model so that it stays cut."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# sharding needs transformers, and a Sparsifier of any network doesn't
_HOMES = {
    "Sharded": "secateur.train.sharding",
    "fsdp2_accelerator": "secateur.train.sharding",
    "empty_model": "secateur.train.shards",
    "Sparsifier": "secateur.train.sparsifier",
    "SparsifierCallback": "secateur.train.callbacks",
    "lightning_callback": "secateur.train.lightning",
}

__all__ = ["Sharded", "Sparsifier", "SparsifierCallback", "empty_model", "fsdp2_accelerator", "lightning_callback"]

if TYPE_CHECKING:
    from secateur.train.callbacks import SparsifierCallback
    from secateur.train.lightning import lightning_callback
    from secateur.train.sharding import Sharded, fsdp2_accelerator
    from secateur.train.shards import empty_model
    from secateur.train.sparsifier import Sparsifier


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'secateur.train' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)
