"""How large a model is: parameters, bytes in memory and on disk, and the peak memory of a forward.

Peak memory is the largest number of bytes of tensors that are alive at one time while a decoder reads one prompt, or
another network its example inputs: its weights and buffers, the activations and the KV cache. On a CPU the tensors are
counted one by one as operators make them. The resident size of the process would also count what the allocator keeps,
the libraries and the other models in the process, and differs from run to run; the count is exact, the same in every
run, and comparable between models that share a process. It leaves out workspaces inside kernels. On a GPU it is the
allocator's own peak during the forward, less what was allocated before, plus the model's weights.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from secateur.errors import UsageError
from secateur.evaluation.base import Inputs, Settings, is_decoder
from secateur.evaluation.runners import open_runner
from secateur.kinds import is_onnx
from secateur.models.sources import Source, stored_names
from secateur.observe.calibration import cached_forward, check_length, evaluating
from secateur.report import Metric
from secateur.report.report import BYTES_ON_DISK
from secateur.tensorfiles import tensors_of
from secateur.timing import wait

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WEIGHT_FILES = ("*.safetensors", "*.bin", "*.gguf")


@dataclass(frozen=True)
class Size:
    """``size``: what the model weighs."""

    @classmethod
    def parse(cls, argument: str) -> Size:
        """From the text after ``size:``, which must be empty. Raises UsageError."""
        if argument:
            raise UsageError(f"size has no settings, got '{argument}'; write size")
        return cls()

    @property
    def name(self) -> str:
        """``size``"""
        return "size"

    def check(self, model: Any, tokenizer: PreTrainedTokenizerBase | None, settings: Settings) -> None:
        check_length(model, settings.length)

    def measure(
        self, models: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None, settings: Settings
    ) -> list[Metric]:
        """Five metrics: parameters, non-zero parameters, bytes, bytes on disk, peak memory.

        Peak memory is left out where an ONNX model is among the models. Raises UsageError for a module without
        example inputs.
        """
        if settings.inputs is None:
            for name, model in models.items():
                if not is_decoder(model):
                    raise UsageError(f"size of model {name} needs example_inputs=(x,), what it is called with")
                self.check(model, tokenizer, settings)
        weights: dict[str, Weight] = {}
        for done, (name, model) in enumerate(models.items(), start=1):
            weigh = _weigh_onnx if is_onnx(model) else _weigh_module
            weights[name] = weigh(model, settings, settings.folders.get(name))
            settings.progress("size", done, len(models))

        def metric(name: str, unit: str, protocol: str, pick: Callable[[Weight], int | None]) -> list[Metric]:
            values = {n: pick(weight) for n, weight in weights.items()}
            found: dict[str, float] = {n: v for n, v in values.items() if v is not None}
            return [Metric(name, unit, found, False, protocol)] if len(found) == len(values) else []

        where = "weight files of the folder" if settings.folders else "as a safetensors checkpoint"
        memory = f"live tensors while reading 1 x {settings.length} tokens: weights, activations, KV cache"
        if settings.inputs is not None:
            where = "as a safetensors checkpoint, or as .onnx"
            memory = f"live tensors during one call on {settings.inputs}: weights, activations"
        return [
            *metric("parameters", "", "tied parameters counted once", lambda w: w.parameters),
            *metric("non-zero parameters", "", "tied parameters counted once", lambda w: w.nonzero),
            *metric("bytes", "bytes", "weights and buffers in memory", lambda w: w.bytes),
            *metric(BYTES_ON_DISK, "bytes", where, lambda w: w.disk),
            *metric("peak memory", "bytes", memory, lambda w: w.peak),
        ]


@dataclass(frozen=True)
class Weight:
    """What one model weighs; ``peak`` is None where it can't be told."""

    parameters: int
    nonzero: int
    bytes: int
    disk: int
    peak: int | None


def _weigh_module(model: Any, settings: Settings, folder: Path | None) -> Weight:
    peak = peak_bytes(model, settings.length) if settings.inputs is None else peak_of_call(model, settings.inputs)
    return Weight(count_parameters(model), count_nonzero(model), count_bytes(model), _disk_bytes(model, folder), peak)


def _weigh_onnx(model: Any, settings: Settings, folder: Path | None) -> Weight:
    """Initialisers of floating point count as parameters; what onnxruntime takes of memory can't be told from here."""
    from secateur.structure.onnx import load_onnx
    from secateur.structure.onnx.network import FLOATING

    proto = load_onnx(model) if isinstance(model, str | Path) else model
    from onnx import numpy_helper

    arrays = [numpy_helper.to_array(t) for t in proto.graph.initializer if t.data_type in FLOATING and t.dims]
    return Weight(
        parameters=sum(a.size for a in arrays),
        nonzero=sum(int((a != 0).sum()) for a in arrays),
        bytes=sum(a.nbytes for a in arrays),
        disk=proto.ByteSize(),
        peak=None,
    )


def stored_size(sources: Mapping[str, Source]) -> list[Metric]:
    """The metrics that need no running model: parameters, non-zero parameters, bytes, bytes on disk."""
    parameters, nonzero, size, disk = ({name: 0.0 for name in sources} for _ in range(4))
    for name, source in sources.items():
        for tensor in stored_names(source.model):
            entries, zeros, itemsize = source.count(tensor)
            parameters[name] += entries
            nonzero[name] += entries - zeros
            size[name] += entries * itemsize
        folder = source.folder
        disk[name] = _disk_bytes(source.model, folder) if folder else size[name]
    return [
        Metric("parameters", "", parameters, False, "tied parameters counted once"),
        Metric("non-zero parameters", "", nonzero, False, "tied parameters counted once"),
        Metric("bytes", "bytes", size, False, "weights and buffers in memory"),
        Metric(BYTES_ON_DISK, "bytes", disk, False, "weight files of the folder"),
    ]


def count_parameters(model: nn.Module) -> int:
    """Number of parameters; a tied one counts once."""
    return sum(p.numel() for p in model.parameters())


def count_nonzero(model: nn.Module) -> int:
    """Number of parameters that are not zero; a tied one counts once."""
    return sum(int(torch.count_nonzero(p.detach())) for p in model.parameters())


def count_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and of the buffers that a checkpoint keeps, each in its own dtype."""
    return sum(t.numel() * t.element_size() for t in tensors_of(model).values())


def checkpoint_bytes(model: nn.Module) -> int:
    """Bytes of the model as one safetensors file, header included, without writing it."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    # safetensors orders by alignment, then name, and pads the header to 8 bytes
    tensors = sorted(tensors_of(model).items(), key=lambda item: (-item[1].element_size(), item[0]))
    for name, tensor in tensors:
        end = offset + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    header = len(json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-header // 8) * 8 + offset


def peak_bytes(model: PreTrainedModel, length: int) -> int:
    """Peak bytes of live tensors while the model reads one prompt of ``length`` tokens (see the module's docstring)."""
    ids_BT = torch.arange(length)[None] % model.config.get_text_config().vocab_size
    # not inference_mode: composite operators would then hide their intermediate tensors
    with evaluating(model), torch.no_grad():
        return _peak(model, model.device, lambda: cached_forward(model, ids_BT.to(model.device)))


def peak_of_call(model: nn.Module, inputs: Inputs) -> int:
    """Peak bytes of live tensors during one call of any module."""
    runner = open_runner(model)
    with runner.ready(inputs) as call:
        return _peak(model, runner.device, call)


def _peak(model: nn.Module, device: torch.device, call: Callable[[], object]) -> int:
    weights = sum(s.nbytes() for s in _storages(model).values())
    if device.type == "cuda":
        return weights + _cuda_increase(device, call)
    with LiveBytes(_storages(model)) as live:
        call()
    return weights + live.peak


@dataclass
class _Count:
    live: int = 0
    peak: int = 0
    known: set[int] = field(default_factory=set)

    def add(self, key: int, size: int) -> None:
        self.known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)

    def drop(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operators make while the mode is on, until they are freed.

    ``given`` are storages that exist already and are not counted; ``peak`` is the largest count so far.
    """

    def __init__(self, given: Mapping[int, torch.UntypedStorage]) -> None:
        super().__init__()
        self._given = set(given)
        self._count = _Count()

    @property
    def peak(self) -> int:
        """Largest number of bytes that were alive at one time."""
        return self._count.peak

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                self._see(tensor.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size, count = storage._cdata, storage.nbytes(), self._count
        if key in self._given or key in count.known:
            return
        count.add(key, size)
        weakref.finalize(storage, count.drop, key, size).atexit = False


def _storages(model: nn.Module) -> dict[int, torch.UntypedStorage]:
    tensors = [*model.parameters(), *model.buffers()]
    return {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors}


def _cuda_increase(device: torch.device, call: Callable[[], object]) -> int:
    wait(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    wait(device)
    return torch.cuda.max_memory_allocated(device) - before


def _disk_bytes(model: nn.Module, folder: Path | None) -> int:
    files = [f for pattern in WEIGHT_FILES for f in folder.glob(pattern)] if folder and folder.is_dir() else []
    return sum(f.stat().st_size for f in files) if files else checkpoint_bytes(model)


_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
