"""Which model is this? Shapes decide whether a plan fits; sampled weights whether it was made for these values."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from secateur.provenance import Fingerprint
from secateur.rowmasks import whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from secateur.models.sources import Source

# enough to tell two trainings apart, and only a few pages of a large file
_RUNS, _RUN_LENGTH = 8, 128
# what a config holds beside the way in which the model computes
_ABOUT = ("_name_or_path", "architectures", "dtype", "transformers_version")

Part = Callable[[str, int, int], torch.Tensor]
"""name of a parameter, first entry, count → these entries, flat"""


def fingerprint(source: Source) -> Fingerprint:
    """Architecture, hash of all names and shapes, hash of a sample of every parameter (as float32).

    The sample is eight evenly spaced runs of 128 consecutive entries, or the whole of a small tensor.
    """
    return _fingerprint(source.model, source.part)


def memory_fingerprint(model: PreTrainedModel) -> Fingerprint:
    """The same of a model in memory, of any architecture; of one that is sharded over ranks all of them call this."""
    parameters = dict(model.named_parameters())

    @lru_cache(maxsize=1)
    def flat(name: str) -> torch.Tensor:
        return whole(parameters[name]).flatten()

    def part(name: str, first: int, count: int) -> torch.Tensor:
        return flat(name)[first : first + count]

    return _fingerprint(model, part)


def _fingerprint(model: PreTrainedModel, part: Part) -> Fingerprint:
    shapes, weights = hashlib.sha256(), hashlib.sha256()
    for name, tensor in sorted(model.named_parameters()):
        shapes.update(f"{name}:{list(tensor.shape)};".encode())
        for sample in _samples(part, name, tensor.numel()):
            weights.update(sample.to(torch.float32).cpu().numpy().tobytes())
    return Fingerprint(
        architecture=type(model).__name__,
        shapes=shapes.hexdigest(),
        weights=weights.hexdigest(),
        num_layers=int(model.config.num_hidden_layers),
        name=display_name(model),
        revision=str(getattr(model, "secateur_revision", "")),
    )


def _samples(part: Part, name: str, count: int) -> Iterator[torch.Tensor]:
    if count <= _RUNS * _RUN_LENGTH:
        yield part(name, 0, count)
        return
    for run in range(_RUNS):
        yield part(name, (count - _RUN_LENGTH) * run // (_RUNS - 1), _RUN_LENGTH)


def config_document(model: PreTrainedModel) -> dict[str, Any]:
    """How the model computes, as JSON: under another config the same weights give other activations."""
    config = {name: value for name, value in model.config.to_dict().items() if name not in _ABOUT}
    return json.loads(json.dumps(config, default=str))


def config_hash(model: PreTrainedModel) -> str:
    """Hash of the same."""
    return hashlib.sha256(json.dumps(config_document(model), sort_keys=True).encode()).hexdigest()


def display_name(model: PreTrainedModel) -> str:
    """What the model is called: hub id or last part of its folder, never a path of this machine."""
    name = str(getattr(model, "secateur_name", "") or model.config._name_or_path or type(model).__name__)
    if name.startswith(("/", ".", "~")) or Path(name).exists():
        return Path(name.rstrip("/")).name or name
    return name
