"""The weights of a checkpoint in files of a given size, and the index that says which tensor lies in which."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any

from secateur.errors import UsageError
from secateur.models.weightfiles import INDEX
from secateur.tensorfiles import Source, Tally, write_tensors

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{letter}B": 1000**power for power, letter in enumerate("KMGT", start=1)}
_UNITS |= {f"{letter}IB": 1024**power for power, letter in enumerate("KMGT", start=1)}


def parse_size(text: str | int) -> int:
    """``5GB``, ``500MB``, ``2GiB`` or a number of bytes → bytes. Raises UsageError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    if found is None or found[2].upper() not in _UNITS or float(found[1]) <= 0:
        raise UsageError(f"a size is a number with a unit such as 5GB or 500MB, got {text!r}")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def write_shards(
    tensors: Mapping[str, Source],
    folder: Path,
    max_shard_size: int,
    *,
    finished: Container[str] = (),
    done: Callable[[str, int, int], None] = lambda file, number, total: None,
) -> dict[str, Tally]:
    """Write ``tensors``, in their order, to files of at most ``max_shard_size`` bytes, and the index if they are many.

    Each file is on the disk before ``done`` is told of it; files named in ``finished`` are there already. Only a
    tensor that is larger than the limit makes a file that is. Returns what is known of every file that was written,
    by its name. Raises OSError.
    """
    from huggingface_hub.serialization import split_state_dict_into_shards_factory  # type: ignore[attr-defined]

    split: Any = split_state_dict_into_shards_factory(
        dict(tensors),  # pyright: ignore[reportArgumentType]
        get_storage_size=lambda source: source.size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    tallies: dict[str, Tally] = {}
    for number, (file, names) in enumerate(split.filename_to_tensors.items(), start=1):
        if file not in finished:
            tallies[file] = Tally()
            write_tensors(folder / file, {n: tensors[n] for n in names}, durable=True, tally=tallies[file])
            done(file, number, len(split.filename_to_tensors))
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf8")
    return tallies
