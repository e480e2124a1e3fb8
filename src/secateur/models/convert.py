"""Any checkpoint as an ordinary safetensors folder; see ``secateur.convert``."""

from __future__ import annotations

import functools
import shutil
from collections import Counter
from pathlib import Path

from torch import Tensor

from secateur.errors import UsageError, nearest
from secateur.files import check_output, output_folder
from secateur.manifest import write_manifest
from secateur.models import loading
from secateur.models.card import model_card
from secateur.models.layout import layout_of
from secateur.models.loading import open_folder, quiet
from secateur.models.packed import PACKED_VERSION, pack
from secateur.models.saving import FORMATS, copy_modelling_file, save_model, saved_config
from secateur.models.shards import parse_size, write_shards
from secateur.models.skeleton import Checkpoint
from secateur.models.weightfiles import has_safetensors
from secateur.remote import expanded, place
from secateur.tensorfiles import Made, Source

# what belongs to a checkpoint beside its weights and config
_COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "additional_chat_templates",
    "LICENSE*",
    "plan",
)


def convert_model(
    name: str | Path,
    folder: str | Path,
    *,
    format: str = "dense",
    max_shard_size: str = "5GB",
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    overwrite: bool = False,
) -> Path | str:
    """See ``secateur.convert``."""
    if format not in FORMATS:
        raise UsageError(f"format must be one of {', '.join(FORMATS)}, got {format!r}{nearest(format, FORMATS)}")
    shard_bytes = parse_size(max_shard_size)
    check_output(folder, overwrite)
    source = expanded(name)
    if source.is_dir() and (source / "config.json").is_file() and has_safetensors(source):
        checkpoint = open_folder(source, trust_remote_code)
        if _streamable(checkpoint):
            with quiet():
                return _stream(checkpoint, folder, format, shard_bytes, overwrite)
    model, tokenizer = loading.load_model(
        name, dtype="auto", trust_remote_code=trust_remote_code, allow_pickle=allow_pickle
    )
    return save_model(
        model,
        tokenizer,
        folder,
        format=format,
        max_shard_size=shard_bytes,
        overwrite=overwrite,
        base_name=source.name or str(name),
    )


def _streamable(checkpoint: Checkpoint) -> bool:
    """True when the names in the files are those of the model, whichever format they are in."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    mapped = get_model_conversion_mapping(checkpoint.model, add_legacy=False)
    identical = all(name == stored for name, stored in checkpoint.names.items())
    return identical and not mapped and not checkpoint.converted and not checkpoint.model.is_custom_code()


def _stream(
    checkpoint: Checkpoint, folder: str | Path, format: str, max_shard_size: int, overwrite: bool
) -> Path | str:
    layout = layout_of(checkpoint.model)
    sources, shapes = _packed(checkpoint) if format == "packed" else (_dense(checkpoint), {})
    if shapes:
        layout["packed"] = {"version": PACKED_VERSION, "tensors": shapes}
    config, remote = saved_config(checkpoint.model, layout, _dtype(checkpoint))
    with output_folder(folder, overwrite=overwrite) as path:
        tallies = write_shards(sources, path, max_shard_size)
        config.save_pretrained(str(path))
        if remote:
            copy_modelling_file(path)
        _copy_companions(checkpoint.folder, path)
        card = model_card(Path(place(folder)).name, base_name=checkpoint.folder.name, format=format, remote=remote)
        (path / "README.md").write_text(card, encoding="utf8")
        write_manifest(path, {name: tally.sha256 for name, tally in tallies.items()})
    return place(folder)


def _dense(checkpoint: Checkpoint) -> dict[str, Source]:
    found: dict[str, Source] = {}
    for name in checkpoint.names:
        if name in checkpoint.packed:
            dtype = checkpoint.stored[f"{name}.values"].dtype
            shape = tuple(checkpoint.packed[name])
            found[name] = Made(dtype, shape, functools.partial(checkpoint.read, name))
        else:
            found[name] = checkpoint.stored[name]
    return found


def _packed(checkpoint: Checkpoint) -> tuple[dict[str, Source], dict[str, list[int]]]:
    """Each tensor is read once to learn how many entries it keeps, and again for each of its two parts."""
    found: dict[str, Source] = {}
    shapes: dict[str, list[int]] = {}

    for name in checkpoint.names:
        parts = [f"{name}.{leaf}" for leaf in ("bitmap", "values")]
        if name in checkpoint.packed:
            found.update({part: checkpoint.stored[part] for part in parts})
            shapes[name] = list(checkpoint.packed[name])
            continue
        packed, shape = pack({name: checkpoint.stored[name].read()})
        if shape:
            for part in parts:
                make = functools.partial(_packed_part, checkpoint, name, part)
                found[part] = Made(packed[part].dtype, tuple(packed[part].shape), make)
            shapes.update(shape)
        else:
            found[name] = checkpoint.stored[name]
    return found, shapes


def _packed_part(checkpoint: Checkpoint, name: str, part: str) -> Tensor:
    return pack({name: checkpoint.read(name)})[0][part]


def _dtype(checkpoint: Checkpoint) -> str:
    """The dtype that most of the bytes have."""
    sizes: Counter[str] = Counter()
    for stored in checkpoint.stored.values():
        if stored.dtype.is_floating_point:
            sizes[str(stored.dtype).removeprefix("torch.")] += stored.size
    return sizes.most_common(1)[0][0]


def _copy_companions(source: Path, target: Path) -> None:
    for pattern in _COMPANIONS:
        for path in source.glob(pattern):
            if path.is_dir() and not path.is_symlink():
                shutil.copytree(path, target / path.name)
            elif path.is_file():
                shutil.copyfile(path, target / path.name)
