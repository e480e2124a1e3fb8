"""Operators that only move entries: reshapes, permutations, slices, concatenations, look-ups."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from secateur.structure.onnx.network import Array
from secateur.structure.onnx.trace import OnnxTrace, rule, shared
from secateur.structure.rules import convolution, indexing, shape
from secateur.structure.traced import Call, NoRule, Value, Zeros


@rule("Reshape", "Flatten", settings=(1,), zeros=Zeros.KEPT)
def reshape(trace: OnnxTrace, call: Call) -> Value:
    return Value(tuple(shape.reshaped(trace, list(call["inputs"][0].dims), call.shape)))


@rule("Transpose", zeros=Zeros.KEPT)
def transpose(trace: OnnxTrace, call: Call) -> Value:
    dims = call["inputs"][0].dims
    return Value(tuple(dims[d] for d in call.get("perm", range(len(dims))[::-1])))


@rule("Squeeze", settings=(1,), zeros=Zeros.KEPT)
def squeeze(trace: OnnxTrace, call: Call) -> Value:
    dims = call["inputs"][0].dims
    axes = listed(trace, call, "axes", 1)
    given = [d for d, labels in enumerate(dims) if len(labels) == 1] if axes is None else [a % len(dims) for a in axes]
    return Value(tuple(labels for d, labels in enumerate(dims) if d not in given))


@rule("Unsqueeze", settings=(1,), zeros=Zeros.KEPT)
def unsqueeze(trace: OnnxTrace, call: Call) -> Value:
    rank = len(call.shape)
    axes = {a % rank for a in listed(trace, call, "axes", 1) or ()}
    inside = iter(call["inputs"][0].dims)
    one = trace.units.fixed(1, "a dimension of size 1")
    return Value(tuple(one if d in axes else next(inside) for d in range(rank)))


def listed(trace: OnnxTrace, call: Call, name: str, at: int) -> list[int] | None:
    """Numbers that are an attribute or, in newer operators, an input; None when they aren't given. Raises NoRule."""
    if name in call.arguments:
        found = call[name]
        return list(found) if isinstance(found, Sequence) else [found]
    if at >= len(call["inputs"]) or call["inputs"][at] is None:
        return None
    known = trace.constant(call, at)
    if known is None:
        raise NoRule(f"its {name} are computed")
    return [int(n) for n in known.reshape(-1)]


@rule("Expand", settings=(1,), zeros=Zeros.REPEATED)
def expand(trace: OnnxTrace, call: Call) -> Value:
    return shared(shape.expand, trace, call, "aten::expand", self=call["inputs"][0])


@rule("Tile", settings=(1,), zeros=Zeros.REPEATED)
def tile(trace: OnnxTrace, call: Call) -> Value:
    x = call["inputs"][0]
    times = [n // max(1, m) for n, m in zip(call.shape, x.shape, strict=True)]
    return shared(shape.repeat, trace, call, "aten::repeat", self=x, repeats=times)


@rule("Concat", zeros=Zeros.KEPT)
def concat(trace: OnnxTrace, call: Call) -> Value:
    return shared(shape.cat, trace, call, "aten::cat", tensors=call["inputs"], dim=call["axis"])


@rule("Split", settings=(1,), zeros=Zeros.KEPT)
def split(trace: OnnxTrace, call: Call) -> list[Value]:
    return shared(shape.split, trace, call, "aten::split", self=call["inputs"][0], dim=call.get("axis", 0))


def bounds(trace: OnnxTrace, call: Call) -> list[tuple[int, slice | None]]:
    """(dimension, what of it is taken) of a Slice; None where that is computed. Raises NoRule."""
    rank = len(call["inputs"][0].dims)
    starts, ends = _entries(trace, call, "starts", 1), _entries(trace, call, "ends", 2)
    axes, steps = listed(trace, call, "axes", 3), listed(trace, call, "steps", 4)
    axes = [a % rank for a in axes] if axes is not None else list(range(len(starts)))
    found: list[tuple[int, slice | None]] = []
    for at, axis in enumerate(axes):
        start, end, step = starts[at], ends[at], steps[at] if steps else 1
        # before the first entry, going backwards, there is only the end
        stop = None if end is None or (step < 0 and end < -len(call["inputs"][0].dims[axis])) else end
        found.append((axis, None if start is None or end is None else slice(start, stop, step)))
    return found


def _entries(trace: OnnxTrace, call: Call, name: str, at: int) -> list[int | None]:
    """The same entry by entry, None for one that changes with what the network is fed."""
    if name in call.arguments:
        return list(call[name])
    tensor = trace.network.node(call.node).input[at]
    static = trace.static(tensor)
    if static is None:
        raise NoRule(f"its {name} are computed")
    known = trace.shapes.known[tensor]
    return [int(n) if s else None for n, s in zip(known.reshape(-1), static.reshape(-1), strict=True)]


@rule("Slice", settings=(1, 2, 3, 4), zeros=Zeros.KEPT)
def slice_(trace: OnnxTrace, call: Call) -> Value:
    x = call["inputs"][0]
    for axis, chosen in bounds(trace, call):
        if chosen is None:
            why = f"{call.where} takes a part of it that is computed"
            trace.units.pin(x.dims[axis], why)
            x = x.with_dim(axis, trace.units.fixed(call.shape[axis], why))
        else:
            x = x.with_dim(axis, x.dims[axis][chosen])
    return x


@rule("Gather", settings=(1,), zeros=Zeros.KEPT)
def gather(trace: OnnxTrace, call: Call) -> Value:
    x, index = call["inputs"]
    axis = call.get("axis", 0) % len(x.dims)
    known = trace.constant(call, 1)
    before, after = x.dims[:axis], x.dims[axis + 1 :]
    if axis == 0 and len(x.dims) == 2:
        trace.makes(x.dims[1])
    if known is not None and known.ndim == 1:
        return Value((*before, x.dims[axis][known], *after))
    why = f"{call.where} looks positions up in it"
    trace.units.pin(x.dims[axis], why)
    return Value((*before, *trace.fixed(index.shape, why).dims, *after))


@rule("GatherElements", zeros=Zeros.KEPT)
def gather_elements(trace: OnnxTrace, call: Call) -> Value:
    x, index = call["inputs"]
    return shared(indexing.gather, trace, call, "aten::gather", self=x, index=index, dim=call.get("axis", 0))


@rule("GatherND", settings=(1,), zeros=Zeros.KEPT)
def gather_slices(trace: OnnxTrace, call: Call) -> Value:
    """Positions along the first dimensions are looked up; those behind go through."""
    x, index = call["inputs"]
    behind = x.dims[call.get("batch_dims", 0) + index.shape[-1] :]
    why = f"{call.where} looks positions up in it"
    trace.pin(Value(x.dims[: len(x.dims) - len(behind)]), why)
    return Value((*trace.fixed(call.shape[: len(call.shape) - len(behind)], why).dims, *behind))


@rule("ScatterND", settings=(1,))
def scatter_slices(trace: OnnxTrace, call: Call) -> Value:
    """Positions along the first dimensions are written to; those behind go through."""
    x, index, updates = call["inputs"]
    behind = x.dims[index.shape[-1] :]
    why = f"{call.where} writes into it"
    trace.pin(Value(x.dims[: index.shape[-1]]), why)
    trace.pin(Value(updates.dims[: len(updates.dims) - len(behind)]), why)
    for mine, theirs in zip(behind, updates.dims[len(updates.dims) - len(behind) :], strict=True):
        trace.units.join(mine, theirs)
    return x


@rule("Pad", settings=(1, 2, 3), zeros=Zeros.PADDED)
def pad(trace: OnnxTrace, call: Call) -> Value:
    x = call["inputs"][0]
    amounts: list[int] = []
    for before, after in zip(*padding(trace, call), strict=True):
        amounts = [int(before), int(after), *amounts]
    mode = call.get("mode", "constant")
    return shared(convolution.pad, trace, call, "aten::pad", self=x, pad=amounts, mode=mode)


def padding(trace: OnnxTrace, call: Call) -> Array:
    """[2, dimensions]: how much is added before and behind. Raises NoRule."""
    rank = len(call["inputs"][0].dims)
    given = np.array(listed(trace, call, "pads", 1) or call.get("paddings"), dtype=np.int64).reshape(2, -1)
    axes = listed(trace, call, "axes", 3)
    found = np.zeros((2, rank), dtype=np.int64)
    found[:, list(range(rank)) if axes is None else axes] = given
    return found


@rule("Trilu", settings=(1,), zeros=Zeros.KEPT)
def trilu(trace: OnnxTrace, call: Call) -> Value:
    return shared(shape.triangle, trace, call, "aten::tril", self=call["inputs"][0])
