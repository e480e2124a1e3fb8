"""Where the tensors of a decoder come from: a model in memory, or a checkpoint that is read one block at a time.

The engine sees only this: a skeleton that has every shape (its parameters may lie on the meta device), tensors by
name, and blocks that are opened one after the other. That is why a model larger than memory and a small one
take the same path.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from secateur.ahead import ahead
from secateur.errors import NonFiniteError, ResourceError
from secateur.finite import all_finite
from secateur.memory import available_memory
from secateur.models.decoders import decoder_blocks
from secateur.models.modeling_secateur import unpack_tensor
from secateur.tensorfiles import Made, Stored, count_zeros

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# entries that are looked at together
_PART = 1 << 20


class Source:
    """A decoder in memory. ``model`` has its shapes, config and buffers; ``name`` is the prefix of its blocks.

    Blocks are opened on ``devices``, each on one of them and neighbours together; by default where the model lies.
    """

    def __init__(self, model: PreTrainedModel, devices: Sequence[torch.device] = ()) -> None:
        self.model = model
        self.name, self.blocks = decoder_blocks(model)
        self._devices = tuple(devices)
        # zero entries of the tensors that were looked at
        self._zeros: dict[str, int] = {}

    @property
    def device(self) -> torch.device:
        """Where the first block is opened, and what lies outside the blocks."""
        return self._devices[0] if self._devices else next(self.blocks.parameters()).device

    def device_of(self, layer: int) -> torch.device:
        """Where a block is opened."""
        return self._devices[layer * len(self._devices) // len(self.blocks)] if self._devices else self.device

    @property
    def folder(self) -> Path | None:
        """The folder of the checkpoint that blocks are read from; None in memory."""
        return None

    @property
    def outside(self) -> list[str]:
        """Names of the parameters and stored buffers that lie in no block; a tied one goes by its first name."""
        return [name for name in stored_names(self.model) if not name.startswith(f"{self.name}.")]

    def tensor(self, name: str) -> Tensor:
        """One tensor as it is stored; not to be written to."""
        return _named(self.model, name).detach()

    def part(self, name: str, first: int, count: int) -> Tensor:
        """``count`` entries of a tensor from entry ``first`` on, row-major, [count]."""
        return self.tensor(name).flatten()[first : first + count]

    def origin(self, name: str) -> Stored | Made:
        """A tensor as something that can be written to a file."""
        return Made.of(self.tensor(name))

    def check_outside(self, stop: Event) -> None:
        """Look at every tensor outside the blocks, part by part, until ``stop`` is set. Raises NonFiniteError."""
        for name in self.outside:
            zeros = 0
            for part in self._parts(name):
                if stop.is_set():
                    return
                if not all_finite(part):
                    raise NonFiniteError(f"{name}: {int((~torch.isfinite(part)).sum())} or more weights are NaN or inf")
                zeros += count_zeros(part)
            self._zeros[name] = zeros

    def check(self, name: str, tensor: Tensor, layer: int) -> None:
        """Look at a tensor of a block, unless it was looked at before. Raises NonFiniteError."""
        if name not in self._zeros:
            check_finite(tensor, name, layer, "weights")
            self._zeros[name] = count_zeros(tensor)

    def know(self, zeros: Mapping[str, int]) -> None:
        """Take over how many entries of tensors are zero, by their names in the files."""

    def count(self, name: str) -> tuple[int, int, int]:
        """(entries, zeros among them, bytes of one entry) of a tensor, read part by part if it must be read."""
        if name not in self._zeros:
            self._zeros[name] = sum(map(count_zeros, self._parts(name)))
        origin = self.origin(name)
        return math.prod(origin.shape), self._zeros[name], origin.dtype.itemsize

    def _parts(self, name: str) -> Iterator[Tensor]:
        count = _named(self.model, name).numel()
        for first in range(0, count, _PART):
            yield self.part(name, first, min(_PART, count - first))

    def block_names(self, layer: int) -> list[str]:
        """Full names of all tensors of one block."""
        return [f"{self.name}.{layer}.{name}" for name in self.blocks[layer].state_dict()]

    def block_tensors(self, layer: int) -> dict[str, Tensor]:
        """All tensors of one block by full name, as they are stored; not to be written to."""
        return {name: self.tensor(name) for name in self.block_names(layer)}

    def open(self, layer: int, dtype: torch.dtype) -> nn.Module:
        """A working copy of one block in ``dtype`` on its device, in eval mode; writing to it changes nothing else."""
        return copy.deepcopy(self.blocks[layer]).to(self.device_of(layer), dtype).eval()

    def whole(self, dtype: torch.dtype) -> PreTrainedModel:
        """A working copy of the whole model in ``dtype``, in eval mode; it takes the memory that the model does."""
        return copy.deepcopy(self.model).to(self.device, dtype).eval()  # type: ignore[arg-type]

    def shell(self, dtype: torch.dtype, *, whole: bool = False) -> nn.Module:
        """The base model in ``dtype`` around the source's own blocks, which its caller must not run.

        With ``whole`` the head is part of it. Embeddings, which may be larger than all the rest, stay as they are
        stored; only what they give is converted.
        """
        base = self.model if whole else self.model.base_model
        # nothing is copied but the modules themselves
        shared = {id(p): p for p in base.parameters()} | {id(self.blocks): self.blocks}
        shell = copy.deepcopy(base, shared)
        prefix = "" if whole else _prefix(self.model)
        for name, parameter in list(shell.named_parameters()):
            if (prefix + name).startswith(f"{self.name}."):
                continue
            path, _, leaf = name.rpartition(".")
            module = shell.get_submodule(path)
            if isinstance(module, nn.Embedding):
                value = self.mapped(prefix + name)
                module.register_forward_hook(lambda _module, _args, output: output.to(dtype))
            else:
                value = self.tensor(prefix + name)
                value = value.to(self.device, dtype if value.is_floating_point() else value.dtype)
            setattr(module, leaf, nn.Parameter(value, requires_grad=False))
            del parameter
        if whole and (tied := self._tied_head()) is not None:
            # the embedding's own copy stays as it is stored
            value = self.tensor(tied).to(self.device, dtype)
            shell.get_output_embeddings().weight = nn.Parameter(value, requires_grad=False)  # type: ignore[operator]
        return shell.eval()

    def _tied_head(self) -> str | None:
        """Name of the embedding whose weight the head uses, or None when it has its own."""
        head, embedding = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        table = getattr(embedding, "weight", None)
        if table is None or getattr(head, "weight", None) is not table:
            return None
        return next(name for name, parameter in self.model.named_parameters() if parameter is table)

    def mapped(self, name: str) -> Tensor:
        """One tensor of which only the rows that are looked at take memory, where that is possible."""
        return self.tensor(name)

    def expect(self, names: Iterable[str]) -> None:
        """These tensors will be asked for, once each and in this order: read them ahead."""

    def release(self) -> None:
        """Forget the block that is held, and what was read ahead."""

    def close(self) -> None:
        """Stop reading ahead."""


class CheckpointSource(Source):
    """A decoder whose tensors stay in safetensors files; ``model`` is a skeleton on the meta device.

    ``stored`` maps the names of the skeleton to tensors in files. One block is in memory at a time, and the next is
    read in the background.
    """

    def __init__(
        self, model: PreTrainedModel, stored: dict[str, Stored | PackedTensor], devices: Sequence[torch.device]
    ) -> None:
        super().__init__(model, devices)
        self.stored = stored
        self._held: tuple[int, dict[str, Tensor]] = (-1, {})
        self._unpacked: tuple[str, Tensor] = ("", torch.empty(0))
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self._ahead: dict[int, Future[dict[str, Tensor]]] = {}
        self._direction = 1
        self._expected: deque[str] = deque()
        self._coming = ahead(())

    @property
    def files(self) -> list[Path]:
        """The weight files."""
        parts = (s if isinstance(s, Stored) else s.values for s in self.stored.values())
        return sorted({part.file for part in parts})

    @property
    def folder(self) -> Path:
        return Path(self.model.config._name_or_path)

    def tensor(self, name: str) -> Tensor:
        held = self._held[1].get(name)
        if held is not None:
            return held
        if self._expected and self._expected[0] == name:
            self._expected.popleft()
            return next(self._coming)
        return self.stored[name].read()

    def expect(self, names: Iterable[str]) -> None:
        self._expected = deque(name for name in names if name not in self._held[1])
        stored = [self.stored[name] for name in self._expected]
        self._coming.close()
        self._coming = ahead((part.size, part.read) for part in stored)

    def part(self, name: str, first: int, count: int) -> Tensor:
        stored = self.stored[name]
        if isinstance(stored, Stored):
            return stored.read_flat(first, count)
        if self._unpacked[0] != name:
            self._unpacked = (name, stored.read().flatten())
        return self._unpacked[1][first : first + count]

    def origin(self, name: str) -> Stored | Made:
        stored = self.stored[name]
        return stored if isinstance(stored, Stored) else Made(stored.dtype, stored.shape, stored.read)

    def know(self, zeros: Mapping[str, int]) -> None:
        for name, stored in self.stored.items():
            # what a packed tensor leaves out is zero too
            held = stored if isinstance(stored, Stored) else stored.values
            if held.name in zeros:
                self._zeros[name] = math.prod(stored.shape) - held.numel + zeros[held.name]

    def block_names(self, layer: int) -> list[str]:
        return [name for name in self.stored if name.startswith(f"{self.name}.{layer}.")]

    def block_tensors(self, layer: int) -> dict[str, Tensor]:
        if self._held[0] != layer:
            # a walk back through the blocks goes on that way
            self._direction = -1 if layer + 1 == self._held[0] else 1
            self._held = (-1, {})
            waiting = self._ahead.pop(layer, None)
            tensors = waiting.result() if waiting is not None else self._read(layer)
            self._held = (layer, tensors)
        following = layer + self._direction
        if 0 <= following < len(self.blocks) and following not in self._ahead:
            self._ahead = {following: self._reader.submit(self._read, following)}
        return self._held[1]

    def release(self) -> None:
        self._held, self._ahead = (-1, {}), {}
        self.expect(())

    def open(self, layer: int, dtype: torch.dtype) -> nn.Module:
        block, device = copy.deepcopy(self.blocks[layer]), self.device_of(layer)
        prefix = f"{self.name}.{layer}."
        for name, tensor in self.block_tensors(layer).items():
            cast = dtype if tensor.is_floating_point() else tensor.dtype
            # a copy even where nothing is converted: what is held must stay as it is stored
            _set(block, name.removeprefix(prefix), tensor.to(device, cast, copy=True))
        return block.to(device, dtype).eval()

    def whole(self, dtype: torch.dtype) -> PreTrainedModel:
        model: PreTrainedModel = copy.deepcopy(self.model)
        self._check_room(sum(p.numel() for p in model.parameters()) * dtype.itemsize)
        for name, stored in self.stored.items():
            value = stored.read()
            _set(model, name, value.to(self.device, dtype if value.is_floating_point() else value.dtype))
        # a tied tensor is stored under its first name alone
        model.tie_weights()
        return model.to(self.device).eval()  # type: ignore[arg-type]

    def _check_room(self, size: int) -> None:
        # twice: the weights at work, and the original ones
        if self.device.type == "cpu" and 2 * size > (free := available_memory()):
            raise ResourceError(
                f"a search on the whole model needs {2 * size / 1e9:.1f} GB for its weights and a copy of them, and"
                f" {free / 1e9:.1f} GB are free: take a method that reads one block at a time ('secateur methods')"
            )

    def mapped(self, name: str) -> Tensor:
        stored = self.stored[name]
        if self.device.type != "cpu" or not isinstance(stored, Stored):
            return stored.read().to(self.device)
        # copy on write: torch has no read-only tensors
        raw = np.memmap(stored.file, dtype=np.uint8, mode="c", offset=stored.start, shape=(stored.size,))
        return torch.from_numpy(raw).view(stored.dtype).reshape(stored.shape)

    def close(self) -> None:
        self.release()
        self._reader.shutdown(wait=True, cancel_futures=True)

    def _read(self, layer: int) -> dict[str, Tensor]:
        return {name: self.stored[name].read() for name in self.block_names(layer)}


class PackedTensor:
    """A weight in the packed format: a bitmap and the values that it marks."""

    def __init__(self, bitmap: Stored, values: Stored, shape: tuple[int, ...]) -> None:
        self.bitmap, self.values, self.shape, self.dtype = bitmap, values, shape, values.dtype
        self.name = bitmap.name.removesuffix(".bitmap")
        self.size = math.prod(shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        """The dense tensor."""
        return unpack_tensor(self.name, self.bitmap.read(), self.values.read(), self.shape)


def stored_names(model: PreTrainedModel) -> Iterator[str]:
    """Names of what a checkpoint of ``model`` holds: parameters, tied ones once, and persistent buffers."""
    stored = model.state_dict().keys()
    for name, _ in [*model.named_parameters(), *model.named_buffers()]:
        if name in stored:
            yield name


def check_finite(values: Tensor, where: str, layer: int, what: str) -> None:
    """Raises NonFiniteError when a floating tensor of a block holds NaN or inf."""
    if not all_finite(values):
        bad = int((~torch.isfinite(values)).sum())
        raise NonFiniteError(f"layer {layer}, {where}: {bad} of {values.numel()} {what} are NaN or inf")


def _prefix(model: PreTrainedModel) -> str:
    return f"{model.base_model_prefix}." if model.base_model is not model else ""


def _named(model: nn.Module, name: str) -> Tensor:
    path, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(path), leaf)


def _set(module: nn.Module, name: str, value: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._buffers:
        owner._buffers[leaf] = value
    else:
        setattr(owner, leaf, nn.Parameter(value, requires_grad=False))
