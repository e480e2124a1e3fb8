"""A model's sizes by its name: from headers where there are any, else from the config alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from secateur.estimate.sizes import Sizes, sizes_of
from secateur.models import hub, loading
from secateur.models.opening import open_source
from secateur.models.skeleton import skeleton
from secateur.models.sources import CheckpointSource, Source
from secateur.models.weightless import set_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# of a config without weights; a module per layer takes time even without memory
_MOST_LAYERS = 10_000


def outline(
    name: str | Path,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: hub.Progress | None = None,
) -> tuple[Sizes, list[Path]]:
    """The sizes of a model, by any name that ``secateur.load`` takes, and the weight files that are here.

    Of a model on the hub only the config is fetched; a folder may hold nothing but a config. No weight is read, but
    for a checkpoint that only transformers can translate. Raises what ``secateur.load`` raises.
    """
    if loading.named_on_hub(name):
        repo_id, revision = hub.split_name(str(name), revision)
        folder = hub.fetch_config(repo_id, revision, remote_code=trust_remote_code)
        return _described(folder, name, trust_remote_code), []
    place = Path(loading.locate(name, revision))
    if place.suffix == ".gguf":
        with loading.in_one_sentence(name):
            return _gguf(place), [place]
    if not _has_weights(place):
        return _described(place, name, trust_remote_code), []
    source, _ = open_source(name, revision=revision, trust_remote_code=trust_remote_code, progress=progress)
    source.close()
    files = source.files if isinstance(source, CheckpointSource) else []
    return sizes_of(source), files


def _has_weights(folder: Path) -> bool:
    return any(any(folder.glob(pattern)) for pattern in ("*.safetensors", "*.safetensors.index.json", "*.bin"))


def _described(folder: Path, name: str | Path, trust_remote_code: bool) -> Sizes:
    with loading.quiet(), hub.named(str(folder), name), loading.in_one_sentence(name):
        config = loading.read_config(folder)
        loading.check_config(str(name), config, trust_remote_code)
        model = skeleton(folder, config, _MOST_LAYERS, trust_remote_code)
        set_dtype(model, torch.float32)
        return sizes_of(Source(model), streamed=True)


def _gguf(file: Path) -> Sizes:
    """Of a model that is loaded as a whole, in float32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with loading.quiet():
        config: Any = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.tie_weights()
        return sizes_of(Source(model), streamed=False)
