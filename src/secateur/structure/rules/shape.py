"""Operators that only move entries: views, permutations, slices, concatenations."""

from __future__ import annotations

import math

import numpy as np

from secateur.structure.rules.elementwise import ONE, aligned
from secateur.structure.trace import Call, NoRule, Trace, Value, Zeros, rule
from secateur.structure.traced import Traced
from secateur.structure.units import Labels


@rule("aten::view", "aten::reshape", "aten::_unsafe_view", "aten::_reshape_alias", zeros=Zeros.KEPT)
@rule("aten::flatten", "aten::unflatten", zeros=Zeros.KEPT)
@rule("aten::view_as", "aten::reshape_as", "aten::_reshape_copy", "aten::view_copy", zeros=Zeros.KEPT)
def view(trace: Trace, call: Call) -> Value:
    x = call["self"]
    if len(call.shapes) != 1 or math.prod(call.shape) != math.prod(x.shape):
        raise NoRule("it changes the type")
    return Value(tuple(reshaped(trace, list(x.dims), call.shape)))


def reshaped(trace: Traced, dims: list[Labels], shape: tuple[int, ...]) -> list[Labels]:
    """Labels after a reshape: dimensions are merged and split in the smallest blocks that have equal sizes.

    Raises NoRule for a tensor without entries, of which sizes say nothing.
    """
    if 0 in shape and shape != tuple(map(len, dims)):
        raise NoRule("it reshapes a tensor without entries")
    found: list[Labels] = []
    i = o = 0
    while i < len(dims) or o < len(shape):
        start_i, start_o = i, o
        left = right = 1
        while True:
            if left == right and (i > start_i or o > start_o):
                break
            if (left <= right and i < len(dims)) or o >= len(shape):
                left *= len(dims[i])
                i += 1
            else:
                right *= shape[o]
                o += 1
        found += _block(trace, dims[start_i:i], shape[start_o:o])
    return found


def _block(trace: Traced, dims: list[Labels], shape: tuple[int, ...]) -> list[Labels]:
    one = trace.units.fixed(1, ONE)
    sizes = [n for n in shape if n != 1]
    inside = [labels for labels in dims if len(labels) != 1]
    if not sizes:
        return [one] * len(shape)
    if [len(labels) for labels in inside] != sizes:
        inside = trace.units.split(trace.units.grid(inside), sizes)
    made = iter(inside)
    return [one if n == 1 else next(made) for n in shape]


@rule("aten::permute", zeros=Zeros.KEPT)
def permute(trace: Trace, call: Call) -> Value:
    return Value(tuple(call["self"].dims[d] for d in call["dims"]))


@rule("aten::transpose", "aten::t", "aten::swapaxes", "aten::swapdims", "aten::numpy_T", "aten::mT", zeros=Zeros.KEPT)
def transpose(trace: Trace, call: Call) -> Value:
    dims = list(call["self"].dims)
    if len(dims) < 2:
        return call["self"]
    first, second = call.get("dim0", -2), call.get("dim1", -1)
    dims[first], dims[second] = dims[second], dims[first]
    return Value(tuple(dims))


@rule("aten::expand", "aten::expand_as", "aten::broadcast_to", zeros=Zeros.REPEATED)
def expand(trace: Trace, call: Call) -> Value:
    """New positions are free: they can be left out by expanding less far."""
    x, shape = call["self"], call.shape
    dims = []
    for back, size in enumerate(reversed(shape), start=1):
        here = x.dims[-back] if back <= len(x.dims) else None
        if size == 1:
            dims.append(trace.units.fixed(1, ONE))
        else:
            dims.append(here if here is not None and len(here) == size else trace.units.fresh(size))
    return Value(tuple(reversed(dims)))


@rule("aten::unsqueeze", zeros=Zeros.KEPT)
def unsqueeze(trace: Trace, call: Call) -> Value:
    dims = list(call["self"].dims)
    dims.insert(call["dim"] % (len(dims) + 1), trace.units.fixed(1, ONE))
    return Value(tuple(dims))


@rule("aten::squeeze", zeros=Zeros.KEPT)
def squeeze(trace: Trace, call: Call) -> Value:
    dims = call["self"].dims
    dim = call.get("dim")
    chosen = range(len(dims)) if dim is None else [d % len(dims) for d in (dim if isinstance(dim, list) else [dim])]
    return Value(tuple(labels for d, labels in enumerate(dims) if d not in chosen or len(labels) != 1))


@rule("aten::slice", zeros=Zeros.KEPT)
def slice_(trace: Trace, call: Call) -> Value:
    x, dim = call["self"], call["dim"]
    chosen = slice(call["start"], None if _whole(call["end"]) else call["end"], call["step"])
    return x.with_dim(dim, x.dims[dim][chosen])


def _whole(end: int | None) -> bool:
    return end is None or end >= 1 << 62


@rule("aten::narrow", zeros=Zeros.KEPT)
def narrow(trace: Trace, call: Call) -> Value:
    x, dim, start = call["self"], call["dim"], call["start"]
    return x.with_dim(dim, x.dims[dim][start : start + call["length"]])


@rule("aten::slice_scatter", "aten::select_scatter", zeros=Zeros.KEPT)
def scatter(trace: Trace, call: Call) -> Value:
    """``src`` is written into a copy of ``self``."""
    x, src, dim = call["self"], call["src"], call["dim"]
    dims = list(src.dims)
    if call.name == "aten::select_scatter":
        dims.insert(dim % len(x.dims), trace.units.fixed(1, ONE))
        trace.units.pin(x.dims[dim], f"{call.where} writes one position of it")
    else:
        chosen = slice(call["start"], None if _whole(call["end"]) else call["end"], call["step"])
        trace.units.join(x.dims[dim][chosen], dims[dim])
    for d, (mine, theirs) in enumerate(zip(x.dims, dims, strict=True)):
        if d != dim % len(x.dims):
            trace.units.join(mine, theirs)
    return x


@rule("aten::select", zeros=Zeros.KEPT)
def select(trace: Trace, call: Call) -> Value:
    """One position is taken by its number: the dimension stays as it is."""
    x, dim = call["self"], call["dim"] % len(call["self"].dims)
    trace.units.pin(x.dims[dim], f"{call.where} takes single positions of it")
    return Value(x.dims[:dim] + x.dims[dim + 1 :])


@rule("aten::unbind", zeros=Zeros.KEPT)
def unbind(trace: Trace, call: Call) -> list[Value]:
    one = select(trace, call)
    return [one] * len(call.shapes)


@rule("aten::split", "aten::split_with_sizes", "aten::chunk", "aten::tensor_split", zeros=Zeros.KEPT)
@rule("aten::split_copy", "aten::split_with_sizes_copy", zeros=Zeros.KEPT)
@rule("aten::unsafe_split", "aten::unsafe_chunk", zeros=Zeros.KEPT)
def split(trace: Trace, call: Call) -> list[Value]:
    x, dim = call.values()[0], call["dim"]
    ends = np.cumsum([shape[dim] for shape in call.shapes])
    return [x.with_dim(dim, part) for part in np.split(x.dims[dim], ends[:-1])]


@rule("aten::cat", "aten::concat", zeros=Zeros.KEPT)
def cat(trace: Trace, call: Call) -> Value:
    values = [v for v in call["tensors"] if v.shape != (0,)]
    dim = call["dim"] % len(call.shape)
    joined = np.concatenate([v.dims[dim] for v in values])
    others = [Value(v.dims[:dim] + v.dims[dim + 1 :]) for v in values]
    along = aligned(trace, others, call.shape[:dim] + call.shape[dim + 1 :]).dims
    return Value((*along[:dim], joined, *along[dim:]))


@rule("aten::stack", zeros=Zeros.KEPT)
def stack(trace: Trace, call: Call) -> Value:
    dim = call["dim"] % len(call.shape)
    along = aligned(trace, call["tensors"], call.shape[:dim] + call.shape[dim + 1 :]).dims
    return Value((*along[:dim], trace.units.fixed(call.shape[dim], "it is stacked"), *along[dim:]))


@rule("aten::flip", zeros=Zeros.KEPT)
def flip(trace: Trace, call: Call) -> Value:
    x = call["self"]
    for dim in call["dims"]:
        x = x.with_dim(dim, x.dims[dim][::-1].copy())
    return x


@rule("aten::roll", zeros=Zeros.KEPT)
def roll(trace: Trace, call: Call) -> Value:
    """A rotated dimension must keep its length."""
    x = call["self"]
    for dim in call["dims"] or range(len(x.dims)):
        trace.units.pin(x.dims[dim], f"{call.where} rotates it")
    return x


@rule("aten::repeat", "aten::tile", zeros=Zeros.REPEATED)
def repeat(trace: Trace, call: Call) -> Value:
    x, times = call["self"], list(call.get("repeats") or call["dims"])
    times = [1] * (len(x.dims) - len(times)) + times
    dims: list[Labels] = [trace.units.fixed(1, ONE)] * (len(times) - len(x.dims)) + list(x.dims)
    found = []
    for labels, count in zip(dims, times, strict=True):
        if count == 1:
            found.append(labels)
        elif len(labels) == 1:
            found.append(trace.units.fresh(count))
        else:
            found.append(np.tile(labels, count))
    return Value(tuple(found))


@rule("aten::repeat_interleave", zeros=Zeros.KEPT)
def repeat_interleave(trace: Trace, call: Call) -> Value:
    dim, times = call.get("dim"), call.get("repeats")
    if dim is None or not isinstance(times, int):
        raise NoRule("its counts are computed")
    x = call["self"]
    return x.with_dim(dim, np.repeat(x.dims[dim], times))


@rule("aten::tril", "aten::triu", "aten::diagonal", zeros=Zeros.KEPT)
def triangle(trace: Trace, call: Call) -> Value:
    x = call["self"]
    first, second = (call["dim1"], call["dim2"]) if call.name == "aten::diagonal" else (-2, -1)
    why = f"{call.where} looks at their order"
    for dim in (first, second):
        trace.units.pin(x.dims[dim], why)
    if call.name != "aten::diagonal":
        return x
    kept = [v for d, v in enumerate(x.dims) if d not in (first % len(x.dims), second % len(x.dims))]
    return Value((*kept, trace.units.fixed(call.shape[-1], why)))


@rule("aten::unfold", zeros=Zeros.KEPT)
def unfold(trace: Trace, call: Call) -> Value:
    x, dim = call["self"], call["dimension"] % max(1, len(call["self"].dims))
    why = f"{call.where} takes windows of it"
    trace.units.pin(x.dims[dim], why)
    return Value(
        (
            *x.dims[:dim],
            trace.units.fixed(call.shape[dim], why),
            *x.dims[dim + 1 :],
            trace.units.fixed(call.shape[-1], why),
        )
    )


@rule("aten::meshgrid")
def meshgrid(trace: Trace, call: Call) -> list[Value]:
    for value in call.values():
        for labels in value.dims:
            trace.units.pin(labels, f"{call.where} spans a grid by it")
    return [trace.fixed(shape, f"{call.where} spans a grid") for shape in call.shapes]
