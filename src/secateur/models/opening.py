"""Opening a model for reading block by block: nothing of a checkpoint is read until its turn comes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from secateur.models import hub, loading
from secateur.models.skeletons import NotStreamable, match, skeleton
from secateur.models.sources import CheckpointSource, Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def open_source(
    name: str | Path,
    *,
    revision: str | None = None,
    device: str | Sequence[str] = "cpu",
    trust_remote_code: bool = False,
    progress: hub.Progress | None = None,
) -> tuple[Source, PreTrainedTokenizerBase | None]:
    """A model, by any name that ``load_model`` takes, and its tokenizer; the dtype is the checkpoint's own.

    Blocks are opened on ``device``, or on several: the first ones on the first device, the last ones on the last.

    A GGUF file, and a checkpoint whose names or shapes only transformers can translate, is loaded as a whole; the
    source is then in memory. Raises what ``load_model`` raises.
    """
    devices = [loading.device_of(name) for name in ([device] if isinstance(device, str) else device)]
    place = loading.locate(name, revision, trust_remote_code, progress)
    folder = Path(place)
    if folder.is_dir():
        with loading.quiet(), hub.named(place, name), loading.in_one_sentence(name), suppress(NotStreamable):
            config = loading.read_config(folder)
            loading.check_config(place, config, trust_remote_code)
            loading.check_weights(folder)
            model = skeleton(folder, config, trust_remote_code=trust_remote_code)
            model.secateur_name = hub.plain_name(str(name))  # type: ignore[assignment]
            model.secateur_revision = hub.commit_of(place)  # type: ignore[assignment]
            stored = match(model, folder, config.get("secateur", {}).get("packed", {}).get("tensors", {}))
            tokenizer = loading.load_tokenizer(place, trust_remote_code)
            return CheckpointSource(model, stored, devices), tokenizer
    model, tokenizer = loading.load_model(
        name,
        revision=revision,
        dtype="auto",
        device=str(devices[0]),
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
    model.secateur_name = hub.plain_name(str(name))  # type: ignore[assignment]
    return Source(model, devices), tokenizer
