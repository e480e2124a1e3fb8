"""GPUs that this machine need not have: tensors that say they lie on one, compute on the processor, and don't mix.

Where a tensor lies is a mark on its storage, so views and parameters have it too. Within ``gpu()``

- what is made with ``device="cuda"`` or moved there has the mark, and so has what is computed from it;
- operators refuse tensors of two devices as kernels do, but for numbers (0-d tensors) and for indices;
- ``numpy()`` refuses marked tensors.

Values are those of the processor. What only a driver knows (streams, memory) is nought.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorConverter
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
_MARK = "_lies_on"
_FAKE = torch._C._TorchDispatchModeKey.FAKE  # type: ignore[attr-defined]
_REAL_DEVICE = torch._C.TensorBase.device.__get__  # type: ignore[attr-defined]
aten = torch.ops.aten
# operators that take tensors of two devices
_CROSSING = {aten.copy_.default, aten._copy_from.default, aten.set_.source_Tensor, aten.set_.source_Storage}
_INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
_ALIKE = {aten.cat.default, aten.stack.default, aten.equal.default}


class _Inside(threading.local):
    """Where those lie whose kernels make further tensors of their own, in this thread; ``out``: nowhere but here."""

    def __init__(self) -> None:
        self.places: list[torch.device] = []
        self._out = False

    @property
    def out(self) -> bool:
        """Whether all is as it is: fake tensors have no GPU, even by name, in a build without CUDA."""
        return self._out or torch._C._get_dispatch_mode(_FAKE) is not None  # type: ignore[attr-defined]

    @contextmanager
    def outside(self) -> Iterator[None]:
        before, self._out = self._out, True
        try:
            yield
        finally:
            self._out = before


_inside = _Inside()
_without: list[torch.dtype] = []


def lies_on(tensor: Tensor) -> torch.device:
    """Where a tensor says it lies."""
    real = _REAL_DEVICE(tensor)
    if _inside.out or real.type != "cpu" or tensor.layout != torch.strided:
        return real
    return getattr(tensor.untyped_storage(), _MARK, real)


def _mark(found: Any, device: torch.device, but: Any = ()) -> None:
    if device.type == "cuda" and _without and any(_has_storage(t) and t.dtype in _without for t in tree_leaves(found)):
        raise TypeError(f"this device doesn't have {_without}")
    old = {t.untyped_storage()._cdata for t in tree_leaves(but) if _has_storage(t)}
    for tensor in tree_leaves(found):
        if _has_storage(tensor) and tensor.untyped_storage()._cdata not in old:
            setattr(tensor.untyped_storage(), _MARK, device)


def _has_storage(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and _REAL_DEVICE(value).type == "cpu"


def _on_gpu(value: Any) -> bool:
    return isinstance(value, Tensor) and lies_on(value).type == "cuda"


def _named(value: Any) -> torch.device | None:
    """The device that an argument names, where it does."""
    if isinstance(value, torch.device):
        device = value
    elif isinstance(value, str) and value.partition(":")[0] in ("cpu", "cuda", "meta"):
        device = torch.device(value)
    else:
        return None
    return GPU if device == torch.device("cuda") else device


class _Calls(TorchFunctionMode):
    """Calls that name a device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if _inside.out:
            return func(*args, **kwargs)
        if func in (Tensor.to, Tensor.cpu, Tensor.cuda):
            return self._moved(func, args, kwargs)
        if func is Tensor.numpy and _on_gpu(args[0]):
            raise TypeError("can't convert cuda device type tensor to numpy. Use Tensor.cpu() first")
        if func is Tensor.new_tensor and "device" not in kwargs:
            kwargs["device"] = lies_on(args[0])
        wanted = _named(kwargs.get("device"))
        if wanted is None:
            _inside.places.append(next((lies_on(t) for t in tree_leaves((args, kwargs)) if _on_gpu(t)), CPU))
            try:
                return func(*args, **kwargs)
            finally:
                _inside.places.pop()
        if wanted.type == "meta":
            return func(*args, **kwargs)
        found = func(*args, **{**kwargs, "device": CPU})
        _mark(found, wanted, but=args)
        return found

    def _moved(self, func: Any, args: Any, kwargs: Any) -> Any:
        tensor, *rest = args
        if func is not Tensor.to:
            wanted = CPU if func is Tensor.cpu else torch.device("cuda", *rest[:1] or [0])
            rest, kwargs = [], {}
        else:
            given = [kwargs["device"]] if "device" in kwargs else rest[:1]
            other = lies_on(given[0]) if given and isinstance(given[0], Tensor) else None
            wanted = other or (_named(given[0]) if given else None)
            if wanted is None or wanted.type == "meta" or _REAL_DEVICE(tensor).type == "meta":
                return func(*args, **kwargs)
            if other is not None:
                rest = [given[0].dtype, *rest[1:]]
            else:
                rest = rest if "device" in kwargs else rest[1:]
                kwargs = {k: v for k, v in kwargs.items() if k != "device"}
        found = tensor.to(CPU, *rest, **kwargs) if rest or kwargs else tensor
        if wanted != lies_on(tensor):
            if found.untyped_storage()._cdata == tensor.untyped_storage()._cdata:
                found = found.clone()
            _mark(found, wanted)
        return found


class _Operators(TorchDispatchMode):
    """Operators: where their results lie, and what doesn't mix."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _inside.out:
            return func(*args, **kwargs)
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        places = [lies_on(t) for t in tensors]
        gpus = list(dict.fromkeys(place for place in places if place.type == "cuda"))
        # indices may lie on the processor, and so may numbers
        fine = func in _INDEXING and places[0] != CPU
        here = [t for t, place in zip(tensors, places, strict=True) if place == CPU and (t.dim() or func in _ALIKE)]
        if func not in _CROSSING and (len(gpus) > 1 or (gpus and here and not fine)):
            found = " and ".join(dict.fromkeys(map(str, places)))
            raise RuntimeError(f"Expected all tensors to be on the same device, but {func} found {found}")
        found = func(*args, **kwargs)
        # what a copy goes into comes first
        where = gpus[:1] if func not in _CROSSING else places[:1]
        _mark(found, (where or ([] if tensors else _inside.places[-1:]) or [CPU])[0], but=tensors)
        return found


def _outside(work: Callable[..., Any]) -> Callable[..., Any]:
    """The same, with all tensors on the processor."""

    def done(*args: Any, **kwargs: Any) -> Any:
        with _inside.outside():
            return work(*args, **kwargs)

    return done


class _Generator(torch.Generator):
    """One that draws on the processor, wherever it is asked to."""

    def __new__(cls, device: Any = "cpu") -> torch.Generator:
        return super().__new__(cls, "cpu")


_CUDA: dict[str, Callable[..., Any]] = {
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "device_count": lambda: 2,
    "current_device": lambda: 0,
    "set_device": lambda device: None,
    "get_device_name": lambda device=None: "a GPU by name",
    "is_bf16_supported": lambda including_emulation=True: True,
    "mem_get_info": lambda device=None: (1 << 36, 1 << 36),
    "memory_allocated": lambda device=None: 0,
    "max_memory_allocated": lambda device=None: 0,
    "reset_peak_memory_stats": lambda device=None: None,
    "get_rng_state": lambda device=None: torch.get_rng_state(),
    "set_rng_state": lambda state, device=None: None,
    "manual_seed_all": lambda seed: None,
}


@contextmanager
def gpu(without: Sequence[torch.dtype] = ()) -> Iterator[None]:
    """A machine with two GPUs, in all threads that begin meanwhile; ``without`` some types, as Apple's are."""
    run, autocast = threading.Thread.run, torch.autocast

    def run_there(thread: threading.Thread) -> None:
        with _Calls(), _Operators():
            run(thread)

    def autocast_there(device_type: str, **more: Any) -> Any:
        return autocast("cpu" if device_type == "cuda" else device_type, **more)

    patches: list[Any] = [mock.patch.object(sys.modules[__name__], "_without", list(without))]
    patches += [mock.patch.object(torch.cuda, name, does) for name, does in _CUDA.items()]
    patches += [
        mock.patch.object(torch.accelerator, "synchronize", lambda device=None: None),
        mock.patch.object(torch, "Generator", _Generator),
        mock.patch.object(torch, "autocast", autocast_there),
        mock.patch.object(threading.Thread, "run", run_there),
        # not timed, in large products
        mock.patch("secateur.observe.precision.bfloat16_speedup", lambda device: 2.0),
        mock.patch.multiple(
            Tensor,
            create=True,
            device=property(lies_on),
            is_cuda=property(_on_gpu),
            is_cpu=property(lambda tensor: lies_on(tensor) == CPU),
            get_device=lambda tensor: lies_on(tensor).index if _on_gpu(tensor) else -1,
        ),
    ]
    # where tensors are made fake
    fakes = ((torch.export, "export"), (torch.export.ExportedProgram, "run_decompositions"))
    for where, name in (*fakes, (FakeTensorConverter, "from_real_tensor")):
        patches.append(mock.patch.object(where, name, _outside(getattr(where, name))))
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        stack.enter_context(_Calls())
        stack.enter_context(_Operators())
        yield
