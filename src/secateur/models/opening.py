"""Opening a model for reading block by block: nothing of a checkpoint is read until its turn comes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from secateur.models import hub, loading
from secateur.models.skeleton import Checkpoint
from secateur.models.sources import CheckpointSource, PackedTensor, Source, stored_names
from secateur.models.weightfiles import has_safetensors
from secateur.models.weightless import compute_buffers, set_dtype
from secateur.tensorfiles import Stored

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def open_source(
    name: str | Path,
    *,
    revision: str | None = None,
    device: str | Sequence[str] = "cpu",
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    progress: hub.Progress | None = None,
) -> tuple[Source, PreTrainedTokenizerBase | None]:
    """A model, by any name that ``load_model`` takes, and its tokenizer; the dtype is the checkpoint's own.

    Blocks are opened on ``device``, or on several: the first ones on the first device, the last ones on the last.

    A GGUF file, pickled weights, and a checkpoint whose tensors transformers puts together from several, are loaded
    as a whole; the source is then in memory. Raises what ``load_model`` raises.
    """
    devices = [loading.device_of(name) for name in ([device] if isinstance(device, str) else device)]
    place = loading.locate(name, revision, trust_remote_code, progress)
    folder = Path(place)
    if folder.is_dir() and (has_safetensors(folder) or not allow_pickle):
        with hub.named(place, name):
            checkpoint = loading.open_folder(folder, trust_remote_code)
            stored = _stored(checkpoint)
            if stored is not None:
                model = checkpoint.model
                model.secateur_name = hub.plain_name(str(name))  # type: ignore[assignment]
                model.secateur_revision = hub.commit_of(place)  # type: ignore[assignment]
                with loading.quiet(), loading.in_one_sentence(name):
                    floats = (s.dtype for s in stored.values() if s.dtype.is_floating_point)
                    set_dtype(model, next(floats, torch.float32))
                    compute_buffers(model)
                    tokenizer = loading.load_tokenizer(place, trust_remote_code)
                return CheckpointSource(model, stored, devices), tokenizer
    model, tokenizer = loading.load_model(
        name,
        revision=revision,
        dtype="auto",
        device=str(devices[0]),
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
        progress=progress,
    )
    model.secateur_name = hub.plain_name(str(name))  # type: ignore[assignment]
    return Source(model, devices), tokenizer


def _stored(checkpoint: Checkpoint) -> dict[str, Stored | PackedTensor] | None:
    """Where each tensor of the model lies; None when one of them is put together from others, or computed."""
    if checkpoint.converted:
        return None
    parameters = dict(checkpoint.model.named_parameters(remove_duplicate=False))
    # a tied weight may be stored under another of its names
    spelled = {id(parameters[name]): name for name in checkpoint.names if name in parameters}
    found: dict[str, Stored | PackedTensor] = {}
    for name in stored_names(checkpoint.model):
        there = name if name in checkpoint.names else spelled.get(id(parameters.get(name)))
        if there is None:
            return None
        file_name = checkpoint.names[there]
        if file_name in checkpoint.packed:
            bitmap, values = (checkpoint.stored[f"{file_name}.{part}"] for part in ("bitmap", "values"))
            found[name] = PackedTensor(bitmap, values, tuple(checkpoint.packed[file_name]))
        else:
            found[name] = checkpoint.stored[file_name]
    return found
