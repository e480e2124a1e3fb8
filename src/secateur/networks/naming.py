"""Networks that the command line names: ``net.onnx``, ``package.module:factory``, and what they are called with."""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import UsageError, nearest
from secateur.networks.kinds import is_onnx
from secateur.usercode import Batches, call_object, load_object

_SIZE = r"[a-wyz]*\d+"
_INPUT = re.compile(rf"(?:(?P<name>[^=:]+)=)?(?P<sizes>{_SIZE}(?:x{_SIZE})*)(?::(?P<dtype>\w+))?")
DTYPES = {"float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"}


@dataclass(frozen=True)
class Input:
    """One input as ``NAME=1x3x224x224:float32`` says it; name and dtype may be missing.

    ``n2x3x224x224``: letters before a size leave it free, and 2 is what it is in the example.
    """

    sizes: tuple[int, ...]
    name: str | None = None
    dtype: str | None = None
    free: tuple[int, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Input:
        """Raises UsageError."""
        found = _INPUT.fullmatch(text)
        if not found:
            raise UsageError(f"--input is a size as in 1x3x224x224, x=1x3x224x224 or ids=1x16:int64, got '{text}'")
        if found["dtype"] and found["dtype"] not in DTYPES:
            raise UsageError(f"--input {text}: unknown dtype '{found['dtype']}'{nearest(found['dtype'], DTYPES)}")
        sizes = found["sizes"].split("x")
        free = tuple(dim for dim, size in enumerate(sizes) if not size.isdigit())
        numbers = tuple(int(size.lstrip(string.ascii_lowercase)) for size in sizes)
        return cls(numbers, found["name"], found["dtype"], free)

    def tensor(self) -> Tensor:
        """Zeros of this size: tracing looks at shapes. Raises UsageError."""
        try:
            return torch.zeros(self.sizes, dtype=getattr(torch, self.dtype or "float32"))
        except (RuntimeError, TypeError):  # TypeError: a size that no integer of torch holds
            raise UsageError(f"--input {'x'.join(map(str, self.sizes))} is more than fits into memory") from None


@dataclass(frozen=True)
class Named:
    """A network and its example inputs, as ``secateur.prune`` takes them."""

    network: Any
    example_inputs: Any
    example_kwargs: dict[str, Tensor] | None = None
    dynamic_shapes: Any = None

    def called(self) -> dict[str, Any]:
        """The arguments of ``evaluate``."""
        return {"example_inputs": self.example_inputs, "example_kwargs": self.example_kwargs}

    def arguments(self) -> dict[str, Any]:
        """The arguments of ``anatomy``, ``plan`` and ``prune``."""
        return {**self.called(), "dynamic_shapes": self.dynamic_shapes}


def open_named(model: str, inputs: Sequence[str]) -> Named:
    """The network that ``model`` names. Raises UsageError, and what reading an ONNX model raises."""
    given = [Input.parse(text) for text in inputs]
    twice = sorted({i.name for i in given if i.name and [j.name for j in given].count(i.name) > 1})
    if twice:
        raise UsageError(f"--input {twice[0]} is given twice")
    if is_onnx(model):
        for one in given:
            if one.name is None or one.dtype is not None or one.free:
                raise UsageError("an ONNX model knows its types and open sizes: give --input as NAME=1x3x224x224")
        return Named(model, {i.name: i.sizes for i in given} or None)
    if not given:
        raise UsageError(f"say what {model} is called with: --input 1x3x224x224, repeated for several inputs")
    module = named_network(model)
    args = tuple(i.tensor() for i in given if i.name is None)
    kwargs = {i.name: i.tensor() for i in given if i.name is not None}
    return Named(module, args, kwargs or None, _dynamic_shapes(given))


def _dynamic_shapes(given: Sequence[Input]) -> Any:
    """The free sizes in the form of ``torch.export``. Raises UsageError."""
    if not any(i.free for i in given):
        return None
    if all(i.name is None for i in given):
        return tuple(dict.fromkeys(i.free, "free") for i in given)
    if any(i.name is None for i in given):
        raise UsageError("with free sizes name every --input: x=n2x3x224x224")
    return {i.name: dict.fromkeys(i.free, "free") for i in given}


def named_network(reference: str) -> Any:
    """The name of an ONNX model, or the module that ``package.module:name`` is or makes. Raises UsageError."""
    if is_onnx(reference):
        return reference
    made = load_object(reference)
    if not isinstance(made, nn.Module):
        if not callable(made):
            raise UsageError(f"{reference} must be a torch.nn.Module or a function that makes one")
        made = call_object(reference, made)
    if not isinstance(made, nn.Module):
        raise UsageError(f"{reference} must make a torch.nn.Module, it made {type(made).__name__}")
    return made


def load_batches(reference: str) -> Iterable[Any]:
    """The batches that ``package.module:name`` holds, or returns when called. Raises UsageError."""
    found = load_object(reference)
    if callable(found):
        found = call_object(reference, found)
    if not isinstance(found, Iterable):
        raise UsageError(f"{reference} must be batches or a function that returns them, got {type(found).__name__}")
    # a tuple of tensors is one batch
    return found if isinstance(found, Tensor | Sequence) else Batches(reference, found)
