"""What a module is called with when it is traced."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten, treespec_dumps, treespec_loads

from secateur.errors import UsageError
from secateur.provenance import ExampleInputs


@dataclass(frozen=True)
class Example:
    """What a module is called with when it is traced."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] | None = None
    free: tuple[tuple[int, ...], ...] = ()
    """For every leaf of (args, kwargs) the dimensions whose sizes may differ in other calls; () when none may."""

    def leaves(self) -> tuple[Any, ...]:
        """The tensors and values, in the order of the graph's placeholders."""
        return tuple(tree_flatten((tuple(self.args), dict(self.kwargs or {})))[0])

    def recorded(self) -> ExampleInputs:
        """Shapes and types, for the plan."""
        leaves, spec = tree_flatten((self.args, dict(self.kwargs or {})))
        described = [_described(leaf) for leaf in leaves]
        for one, dims in zip(described, self.free, strict=False):
            if dims:
                one["free"] = list(dims)
        return ExampleInputs(spec=treespec_dumps(spec), leaves=tuple(described))

    def freed(self, module: nn.Module, dynamic_shapes: Any) -> Example:
        """The same with the free dimensions that ``dynamic_shapes`` names, in the form of ``torch.export``.

        A tuple with an entry per positional input, or a dict by the names of ``forward``'s parameters; an entry is
        ``{0: Dim("batch")}``, a list with one such value per dimension, or None; inputs that are lists, tuples or dicts
        have entries for their parts. Numbers, ``Dim.STATIC`` and None are fixed. Raises UsageError.
        """
        if dynamic_shapes is None:
            return self
        if isinstance(dynamic_shapes, Mapping):
            try:
                given = inspect.signature(module.forward).bind(*self.args, **(self.kwargs or {})).arguments
            except TypeError as error:
                raise UsageError(f"{type(module).__name__} can't be called with the example inputs: {error}") from None
            unknown = [str(name) for name in dynamic_shapes if name not in given]
            if unknown:
                raise UsageError(f"dynamic_shapes names {unknown[0]}, but the inputs are {', '.join(given)}")
            pairs = [(given[name], entry) for name, entry in dynamic_shapes.items()]
        elif isinstance(dynamic_shapes, tuple | list) and len(dynamic_shapes) == len(self.args):
            pairs = list(zip(self.args, dynamic_shapes, strict=True))
        else:
            raise UsageError("dynamic_shapes must be a dict by name, or a tuple with an entry per example input")
        found = {id(leaf): dims for value, entry in pairs for leaf, dims in _free_dims(value, entry)}
        return self.with_free(tuple(found.get(id(leaf), ()) for leaf in self.leaves()))

    def with_free(self, free: tuple[tuple[int, ...], ...]) -> Example:
        """The same with these dimensions of every leaf free. Raises UsageError for a dimension of size 1."""
        if not any(free):
            return Example(self.args, self.kwargs)
        leaves, spec = tree_flatten((tuple(self.args), dict(self.kwargs or {})))
        for leaf, dims in zip(leaves, free, strict=True):
            for dim in dims:
                if leaf.shape[dim] < 2:
                    raise UsageError(
                        f"dimension {dim} of an input can't stay free with an example of size {leaf.shape[dim]}, which"
                        " broadcasts: give an example of size 2 or more"
                    )
        # torch.export marks the tensors themselves, and those of the caller stay as they are
        mine = [leaf.detach() if dims else leaf for leaf, dims in zip(leaves, free, strict=True)]
        args, kwargs = tree_unflatten(mine, spec)
        return Example(args, kwargs, free)

    def dynamic_shapes(self, module: nn.Module) -> Any:
        """What ``torch.export`` takes for the free dimensions; None when there are none."""
        if not any(self.free):
            return None
        shapes = torch.export.ShapesCollection()
        for leaf, dims in zip(self.leaves(), self.free, strict=True):
            if dims:
                shapes[leaf] = dict.fromkeys(dims, torch.export.Dim.AUTO)
        return shapes.dynamic_shapes(module, self.args, dict(self.kwargs or {}))

    @classmethod
    def of(cls, inputs: ExampleInputs, module: nn.Module) -> Example:
        """Inputs of the same shapes and types, where the module is; all zeros."""
        device = device_of(module)
        leaves = [
            torch.zeros(leaf["shape"], dtype=getattr(torch, leaf["dtype"]), device=device)
            if "shape" in leaf
            else leaf["value"]
            for leaf in inputs.leaves
        ]
        args, kwargs = tree_unflatten(leaves, treespec_loads(inputs.spec))
        free = tuple(tuple(leaf.get("free", ())) for leaf in inputs.leaves)
        return cls(tuple(args), kwargs, free if any(free) else ())


def device_of(module: nn.Module) -> torch.device:
    """Where a module is: its first parameter, or buffer where it has none; the processor where it has neither."""
    tensors = (tensor for found in (module.parameters(), module.buffers()) for tensor in found)
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def _free_dims(value: Any, entry: Any) -> Iterator[tuple[Tensor, tuple[int, ...]]]:
    """Every tensor of an input with the dimensions that its entry of ``dynamic_shapes`` frees. Raises UsageError."""
    if entry is None:
        return
    if isinstance(value, Tensor):
        sizes = entry.items() if isinstance(entry, Mapping) else enumerate(entry)
        dims = [dim for dim, size in sizes if size is not None and not _fixed(size)]
        for dim in dims:
            if not isinstance(dim, int) or not -value.dim() <= dim < value.dim():
                raise UsageError(f"dynamic_shapes frees dimension {dim} of an input of shape {list(value.shape)}")
        yield value, tuple(sorted(dim % value.dim() for dim in dims))
    elif isinstance(value, Mapping) and isinstance(entry, Mapping):
        for name, one in entry.items():
            yield from _free_dims(value.get(name), one)
    elif isinstance(value, tuple | list) and isinstance(entry, tuple | list):
        for part, one in zip(value, entry, strict=False):
            yield from _free_dims(part, one)
    else:
        raise UsageError(f"dynamic_shapes has an entry for an input that is no tensor but {type(value).__name__}")


def _fixed(size: Any) -> bool:
    return isinstance(size, int) or size is torch.export.Dim.STATIC


def _described(leaf: Any) -> dict[str, Any]:
    if isinstance(leaf, Tensor):
        return {"shape": list(leaf.shape), "dtype": str(leaf.dtype).removeprefix("torch.")}
    if leaf is None or isinstance(leaf, bool | int | float | str):
        return {"value": leaf}
    raise UsageError(f"example inputs must be tensors and plain values, got {type(leaf).__name__}")
