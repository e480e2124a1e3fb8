"""Which model is this? Shapes decide whether a plan fits; sampled weights whether it was made for these values."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from secateur.plans import Fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# enough to tell two trainings apart, little enough to read from a memory-mapped file
_SAMPLED = 1024


def fingerprint(model: PreTrainedModel, read: Callable[[str], Tensor] | None = None) -> Fingerprint:
    """Architecture, hash of all names and shapes, hash of a strided sample of every parameter (as float32).

    ``read`` gives a parameter by its name, for a model whose weights are not in memory.
    """
    shapes, weights = hashlib.sha256(), hashlib.sha256()
    for name, tensor in sorted(model.named_parameters()):
        shapes.update(f"{name}:{list(tensor.shape)};".encode())
        flat = (tensor if read is None else read(name)).detach().flatten()
        sample = flat[:: max(1, flat.numel() // _SAMPLED)]
        weights.update(sample.to(torch.float32).cpu().numpy().tobytes())
    return Fingerprint(
        architecture=type(model).__name__,
        shapes=shapes.hexdigest(),
        weights=weights.hexdigest(),
        num_layers=int(model.config.num_hidden_layers),
        name=display_name(model),
    )


def display_name(model: PreTrainedModel) -> str:
    """What the model is called: hub id or last part of its folder, never a path of this machine."""
    name = str(getattr(model, "secateur_name", "") or model.config._name_or_path or type(model).__name__)
    if name.startswith(("/", ".", "~")) or Path(name).exists():
        return Path(name.rstrip("/")).name or name
    return name
