"""Indexing. With an index that is a constant it is a known map; with one that is computed the dimension stays."""

from __future__ import annotations

import torch

from secateur.structure.rules.elementwise import aligned
from secateur.structure.trace import Call, NoRule, Trace, Value, Zeros, rule
from secateur.structure.units import Labels


@rule("aten::index_select", zeros=Zeros.KEPT)
def index_select(trace: Trace, call: Call) -> Value:
    x, dim = call["self"], call["dim"]
    constant = trace.constant(call.node.args[2])
    trace.units.pin(call["index"].dims[0], f"{call.where} looks positions up by it")
    return x.with_dim(dim, _looked_up(trace, call, x.dims[dim], constant, call.shape[dim]))


def _looked_up(trace: Trace, call: Call, labels: Labels, index: torch.Tensor | None, count: int) -> Labels:
    if index is None:
        why = f"{call.where} looks positions up that are computed"
        trace.units.pin(labels, why)
        return trace.units.fixed(count, why)
    return labels[index.long().cpu().numpy()]


@rule("aten::index", "aten::_unsafe_index", zeros=Zeros.KEPT)
def index(trace: Trace, call: Call) -> Value:
    x = call["self"]
    indices = list(call["indices"]) + [None] * (len(x.dims) - len(call["indices"]))
    used = [d for d, i in enumerate(indices) if i is not None]
    if any(len(indices[d].dims) == 0 for d in used) and len(used) == 1:
        raise NoRule("it takes a single position")
    first = used[0]
    if len(used) == 1 and len(indices[first].dims) == 1:
        constant = trace.constant(call.node.args[1][first])  # type: ignore[index]
        if constant is not None and constant.dtype != torch.bool:
            trace.units.pin(indices[first].dims[0], f"{call.where} looks positions up by it")
            return x.with_dim(first, _looked_up(trace, call, x.dims[first], constant, call.shape[first]))
    why = f"{call.where} looks positions up in it"
    for d in used:
        trace.units.pin(x.dims[d], why)
        for labels in indices[d].dims:
            trace.units.pin(labels, why)
    free = [labels for d, labels in enumerate(x.dims) if d not in used]
    together = used == list(range(first, first + len(used)))
    looked = len(call.shape) - len(free)
    at = first if together else 0
    made = [trace.units.fixed(n, why) for n in call.shape[at : at + looked]]
    return Value((*free[:at], *made, *free[at:]))


@rule("aten::one_hot")
def one_hot(trace: Trace, call: Call) -> Value:
    """A new dimension, of which the entries are told by their positions."""
    return Value((*call["self"].dims, trace.units.fixed(call.shape[-1], f"{call.where} numbers its positions")))


@rule("aten::gather", zeros=Zeros.KEPT)
def gather(trace: Trace, call: Call) -> Value:
    x, index, dim = call["self"], call["index"], call["dim"] % len(call["self"].dims)
    why = f"{call.where} looks positions up in it"
    trace.units.pin(x.dims[dim], why)
    trace.units.pin(index.dims[dim], why)
    for d, (mine, theirs) in enumerate(zip(x.dims, index.dims, strict=True)):
        if d == dim:
            continue
        if len(mine) == len(theirs):
            trace.units.join(mine, theirs)
        else:
            trace.units.pin(mine, why)
            trace.units.pin(theirs, why)
    return index


@rule("aten::index_put", "aten::_index_put_impl", "aten::_unsafe_index_put")
def index_put(trace: Trace, call: Call) -> Value:
    x, indices, values = call["self"], list(call["indices"]), call["values"]
    why = f"{call.where} writes into it"
    used = [d for d, i in enumerate(indices) if i is not None]
    if used != list(range(len(used))) or any(len(indices[d].dims) != 1 for d in used):
        raise NoRule("it writes at several places at once")
    for d in used:
        trace.units.pin(x.dims[d], why)
    for i in indices:
        if i is not None:
            for labels in i.dims:
                trace.units.pin(labels, why)
    free = x.dims[len(used) :]
    behind = Value(values.dims[-len(free) :] if free else ())
    for labels in values.dims[: len(values.dims) - len(free)]:
        trace.units.pin(labels, why)
    aligned(trace, [Value(free), behind], tuple(len(f) for f in free))
    return x


@rule("aten::scatter", "aten::scatter_add", "aten::index_add", "aten::index_copy", "aten::masked_scatter")
def scatter(trace: Trace, call: Call) -> Value:
    raise NoRule("it writes at positions that are computed")
