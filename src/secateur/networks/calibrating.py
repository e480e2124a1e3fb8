"""From the user's batches, or noise, to inputs that a traced network is called with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from secateur.errors import DataError, SecateurError, UsageError
from secateur.finite import all_finite
from secateur.methods import Noise
from secateur.networks.example import Example
from secateur.observe.gradients import batches
from secateur.structure.groups import TracedAnatomy

Calibration = list[tuple[TracedAnatomy, tuple[Any, ...]]]
"""For every batch the anatomy on inputs of its shapes, and the inputs in the order of the graph's placeholders."""


def calibration_of(
    data: Any,
    noise: Noise | None,
    example: Example,
    anatomy: TracedAnatomy,
    anatomy_on: Callable[[Example], TracedAnatomy],
) -> Calibration:
    """The batches that a method looks at: ``data``, or ``noise`` of the shapes of the example inputs.

    A network is traced again, with ``anatomy_on``, for batches of another size than that of the example inputs.
    Raises DataError for no batches, for ones that the network can't be called with, and for NaN.
    """
    if noise is not None:
        if data is not None:
            raise DataError("calibration='noise' takes no data: leave data= out, or take calibration='data'")
        return [(anatomy, one.leaves()) for one in _noise(noise, example)]
    known = {_shapes(example): anatomy}
    found: Calibration = []
    for number, batch in enumerate(batches(data)):
        inputs = _call_of(batch, example, f"batch {number} of the data")
        if _shapes(inputs) not in known:
            known[_shapes(inputs)] = _retraced(anatomy, anatomy_on, inputs, f"batch {number} of the data")
        found.append((known[_shapes(inputs)], inputs.leaves()))
    if not found:
        raise DataError("the data that was given is empty, and this method needs some")
    return found


def _retraced(
    anatomy: TracedAnatomy, anatomy_on: Callable[[Example], TracedAnatomy], inputs: Example, where: str
) -> TracedAnatomy:
    """The anatomy on inputs of other sizes, which must have the same groups and calls."""
    try:
        found = anatomy_on(inputs)
    except SecateurError as error:
        raise DataError(f"{where}: {error}") from None
    same = [(g.name, g.units) for g in found] == [(g.name, g.units) for g in anatomy]
    if not same or _calls(found) != _calls(anatomy):
        raise DataError(
            f"{where} takes another path through the network than the example inputs: give batches of their size"
        )
    return found


def _calls(anatomy: TracedAnatomy) -> list[tuple[str, str]]:
    return [(node.op, str(node.target)) for node in anatomy.trace.graph.nodes]


def _shapes(inputs: Example) -> tuple[Any, ...]:
    return tuple(tuple(leaf.shape) if isinstance(leaf, Tensor) else leaf for leaf in inputs.leaves())


def _call_of(batch: Any, example: Example, where: str) -> Example:
    """What the module is called with for this batch; labels behind the inputs are left out. Raises DataError."""
    names, count = list(example.kwargs or {}), len(example.args)
    if names and count:
        if not (isinstance(batch, Sequence) and len(batch) == 2 and isinstance(batch[1], Mapping)):
            raise DataError(f"{where} must be a pair (tuple, dict), as the module is called with both")
        args, kwargs = tuple(batch[0]), dict(batch[1])
    elif names:
        args, kwargs = (), dict(batch) if isinstance(batch, Mapping) else {}
    else:
        args = (batch,) if isinstance(batch, Tensor) or not isinstance(batch, Sequence) else tuple(batch)
        kwargs = {}
    missing = [name for name in names if name not in kwargs]
    if len(args) < count or missing:
        wanted = f"{count} inputs" if count else ", ".join(missing)
        raise DataError(f"{where} must hold {wanted}, as the example inputs do")
    found = Example(args[:count], {name: kwargs[name] for name in names})
    _check(found, example, where)
    try:
        return found.with_free(example.free)
    except UsageError as error:
        raise DataError(f"{where}: {error}") from None


def _check(inputs: Example, example: Example, where: str) -> None:
    """The same structure, types and sizes as the example, but for the first dimension; finite numbers."""
    spec = tree_flatten((inputs.args, dict(inputs.kwargs or {})))[1]
    if spec != tree_flatten((tuple(example.args), dict(example.kwargs or {})))[1]:
        raise DataError(f"{where} isn't built like the example inputs")
    for number, (mine, theirs) in enumerate(zip(inputs.leaves(), example.leaves(), strict=True)):
        if not isinstance(theirs, Tensor):
            continue
        if not isinstance(mine, Tensor):
            raise DataError(f"input {number} of {where} must be a tensor, got {type(mine).__name__}")
        if mine.shape[1:] != theirs.shape[1:] or mine.dim() != theirs.dim() or mine.dtype != theirs.dtype:
            raise DataError(
                f"input {number} of {where} has shape {list(mine.shape)} and type {_name(mine)}, where the network"
                f" takes {['any', *theirs.shape[1:]] if theirs.dim() else []} and {_name(theirs)}"
            )
        if not len(mine.flatten()):
            raise DataError(f"input {number} of {where} is empty")
        if not all_finite(mine):
            raise DataError(f"input {number} of {where} holds NaN or inf")


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _noise(noise: Noise, example: Example) -> Iterator[Example]:
    """Inputs of the example's shapes until there are as many as asked for. Raises DataError."""
    leaves, spec = tree_flatten((tuple(example.args), dict(example.kwargs or {})))
    for number, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and not leaf.is_floating_point():
            raise DataError(f"noise can't stand in for example input {number}, which is {_name(leaf)}: give data=")
    if not noise.low < noise.high:
        raise DataError(f"the noise must have low < high, got {noise.low:g} and {noise.high:g}")
    each = next((len(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()), 1)
    generator = torch.Generator().manual_seed(noise.seed)
    for _ in range(-(-noise.samples // each)):
        drawn = [_drawn(leaf, noise, generator) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        args, kwargs = tree_unflatten(drawn, spec)
        yield Example(tuple(args), kwargs).with_free(example.free)


def _drawn(leaf: Tensor, noise: Noise, generator: torch.Generator) -> Tensor:
    # drawn on the CPU in float32, so that every device and type sees the same
    uniform = torch.rand(leaf.shape, generator=generator)
    return (noise.low + (noise.high - noise.low) * uniform).to(leaf.device, leaf.dtype)
