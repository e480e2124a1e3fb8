"""A checkpoint put together from finished blocks: config, shards of a given size, their index."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from secateur.errors import UsageError
from secateur.models.saving import write_config
from secateur.models.sources import Source, stored_names
from secateur.models.surgery import cut_model
from secateur.models.weightless import published_names, weightless_copy
from secateur.plans import Plan
from secateur.tensorfiles import Made, Stored, read_header, write_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str | int) -> int:
    """``5GB``, ``500MB``, ``2GiB`` or a number of bytes → bytes. Raises UsageError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    if found is None or found[2].upper() not in _UNITS or float(found[1]) <= 0:
        raise UsageError(f"a size is a number with a unit such as 5GB or 500MB, got {text!r}")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def cut_skeleton(plan: Plan, source: Source) -> PreTrainedModel:
    """The cut model on the meta device: its names, shapes and config."""
    return cut_model(plan, weightless_copy(source.model))


@dataclass(frozen=True)
class Entry:
    """One tensor of the checkpoint: its name there and where its bytes come from."""

    name: str
    origin: Stored | Made


class CheckpointWriter:
    """Writes the checkpoint of ``plan`` on ``source`` to ``folder``.

    ``block_file`` names the file of a dense block that is already cut. ``max_shard_size`` is in bytes.
    """

    def __init__(
        self, source: Source, plan: Plan, block_file: Callable[[int], Path], folder: Path, max_shard_size: int
    ) -> None:
        self._source, self._plan, self._folder, self._limit = source, plan, folder, max_shard_size
        self._block_file = block_file
        self.target = cut_skeleton(plan, source)
        self.kept = kept_layers(plan, len(source.blocks))

    def write(self, finished: Mapping[str, object], done: Callable[[str, int, int], None]) -> bool:
        """Write all files; shards named in ``finished`` are there already, ``done`` is told of every other.

        Returns whether the folder needs its modelling file.
        """
        entries, packed = self._entries()
        remote = write_config(self.target, self._folder, packed)
        if not remote:
            names = published_names(self.target, [e.name for e in entries])
            entries = [Entry(names[e.name], e.origin) for e in entries]
        shards = list(self._shards(entries))
        files = {}
        for number, shard in enumerate(shards, start=1):
            name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            if name not in finished:
                write_tensors(self._folder / name, {e.name: e.origin for e in shard}, durable=True)
                done(name, number, len(shards))
            files |= {e.name: name for e in shard}
        if len(shards) > 1:
            total = sum(e.origin.size for e in entries)
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
            text = json.dumps(index, indent=2) + "\n"
            (self._folder / "model.safetensors.index.json").write_text(text, encoding="utf8")
        return remote

    def _entries(self) -> tuple[list[Entry], dict[str, list[int]]]:
        """What the checkpoint holds, in the order of the model; and the dense shapes of packed tensors."""
        blocks: dict[str, Stored] = {}
        for new, old in enumerate(self.kept):
            before, after = f"{self._source.name}.{old}.", f"{self._source.name}.{new}."
            for name, stored in read_header(self._block_file(old)).items():
                blocks[after + name.removeprefix(before)] = stored
        shapes = {n: t for n, t in [*self.target.named_parameters(), *self.target.named_buffers()]}
        entries, packed = [], {}
        for name in stored_names(self.target):
            if name in blocks:
                entries.append(Entry(name, blocks[name]))
            elif f"{name}.bitmap" in blocks:
                packed[name] = list(shapes[name].shape)
                entries += [Entry(f"{name}.{part}", blocks[f"{name}.{part}"]) for part in ("bitmap", "values")]
            elif name.startswith(f"{self._source.name}."):
                # a bias that the stock class wants in every layer once the config asks for it
                shape, dtype = tuple(shapes[name].shape), shapes[name].dtype
                entries.append(Entry(name, Made(dtype, shape, lambda s=shape, d=dtype: torch.zeros(s, dtype=d))))
            else:
                entries.append(Entry(name, self._source.origin(name)))
        return entries, packed

    def _shards(self, entries: list[Entry]) -> Iterator[list[Entry]]:
        shard: list[Entry] = []
        for entry in entries:
            if shard and sum(e.origin.size for e in shard) + entry.origin.size > self._limit:
                yield shard
                shard = []
            shard.append(entry)
        yield shard


def kept_layers(plan: Plan, layers: int) -> list[int]:
    """The dense numbers of the blocks that stay."""
    return plan.keep["layers"].tolist() if "layers" in plan.keep else list(range(layers))
