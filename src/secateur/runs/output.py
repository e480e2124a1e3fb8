"""A checkpoint put together from finished blocks: config, shards of a given size, their index."""

from __future__ import annotations

from collections.abc import Callable, Container
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from secateur.models.rotation import Rotation
from secateur.models.saving import write_config
from secateur.models.shards import write_shards
from secateur.models.sources import Source, stored_names
from secateur.models.surgery import Cut, cut_model
from secateur.models.weightless import published_names, weightless_copy
from secateur.plans import Plan
from secateur.tensorfiles import Made, Stored, Tally, read_header

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def cut_skeleton(plan: Plan, source: Source) -> PreTrainedModel:
    """The cut model on the meta device: its names, shapes and config."""
    return cut_model(plan, weightless_copy(source.model))


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
        self._changed = changed_outside(plan, source)
        self.kept = kept_layers(plan, len(source.blocks))

    def write(self, finished: Container[str], done: Callable[[str, int, int], None]) -> tuple[bool, dict[str, Tally]]:
        """Write all files; shards named in ``finished`` are there already, ``done`` is told of every other.

        Returns whether the folder needs its modelling file, and what is known of the shards that were written.
        """
        tensors, packed = self._tensors()
        remote = write_config(self.target, self._folder, packed)
        if not remote:
            names = published_names(self.target, list(tensors))
            tensors = {names[name]: tensor for name, tensor in tensors.items()}
        return remote, write_shards(tensors, self._folder, self._limit, finished=finished, done=done)

    def _tensors(self) -> tuple[dict[str, Stored | Made], dict[str, list[int]]]:
        """What the checkpoint holds, in the order of the model; and the dense shapes of packed tensors."""
        blocks: dict[str, Stored] = {}
        for new, old in enumerate(self.kept):
            before, after = f"{self._source.name}.{old}.", f"{self._source.name}.{new}."
            for name, stored in read_header(self._block_file(old)).items():
                blocks[after + name.removeprefix(before)] = stored
        shapes = {n: t for n, t in [*self.target.named_parameters(), *self.target.named_buffers()]}
        found: dict[str, Stored | Made] = {}
        packed = {}
        for name in stored_names(self.target):
            if name in blocks:
                found[name] = blocks[name]
            elif f"{name}.bitmap" in blocks:
                packed[name] = list(shapes[name].shape)
                found |= {part: blocks[part] for part in (f"{name}.bitmap", f"{name}.values")}
            elif name.startswith(f"{self._source.name}."):
                # a bias that the stock class wants in every layer once the config asks for it
                shape, dtype = tuple(shapes[name].shape), shapes[name].dtype
                found[name] = Made(dtype, shape, lambda s=shape, d=dtype: torch.zeros(s, dtype=d))
            elif name in self._changed:
                found[name] = Made(shapes[name].dtype, tuple(shapes[name].shape), partial(self._changed[name], name))
            else:
                found[name] = self._source.origin(name)
        return found, packed


def changed_outside(plan: Plan, source: Source) -> dict[str, Callable[[str], Tensor]]:
    """What makes the tensors that lie in no block and aren't as they were, by their names."""
    if plan.rotations:
        rotation = Rotation(source.model, plan.rotations, source.tensor, source.device)
        return dict.fromkeys(rotation.changed, rotation.outside)
    cut = Cut(plan, source.model)

    def made(name: str) -> Tensor:
        old = source.tensor(name)
        return cut.tensor(name, old, old)

    return {name: made for name in cut.touched if not name.startswith(f"{source.name}.")}


def kept_layers(plan: Plan, layers: int) -> list[int]:
    """The dense numbers of the blocks that stay."""
    return plan.keep["layers"].tolist() if "layers" in plan.keep else list(range(layers))
