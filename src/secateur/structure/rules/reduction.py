"""Sums, means, maxima and soft-maxima: kept dimensions go through."""

from __future__ import annotations

from secateur.structure.trace import Call, Trace, Value, Zeros, rule

ONE = "a dimension of size 1"


def _dims(call: Call, rank: int) -> list[int]:
    dim = call.get("dim")
    if dim is None or dim == []:
        return list(range(rank))
    return [d % max(rank, 1) for d in (dim if isinstance(dim, list | tuple) else [dim])]


def reduced(trace: Trace, call: Call, x: Value, over: list[int]) -> list[Value]:
    """``x`` without the dimensions in ``over``, or with one position in each."""
    if call.get("keepdim"):
        dims = tuple(trace.units.fixed(1, ONE) if d in over else labels for d, labels in enumerate(x.dims))
    else:
        dims = tuple(labels for d, labels in enumerate(x.dims) if d not in over)
    return [Value(dims) for _ in call.shapes]


@rule("aten::sum", "aten::any", "aten::count_nonzero", zeros=Zeros.KEPT)
@rule("aten::linalg_vector_norm", "aten::norm", "aten::frobenius_norm", zeros=Zeros.KEPT)
def total(trace: Trace, call: Call) -> list[Value]:
    """Zeros add nothing: what leaves along a summed dimension leaves no trace in the output."""
    x = call.values()[0]
    over = _dims(call, len(x.dims))
    for dim in over:
        trace.sums(call, x.dims[dim])
    return reduced(trace, call, x, over)


@rule("aten::mean", "aten::var", "aten::std", "aten::var_mean", "aten::std_mean", zeros=Zeros.KEPT)
@rule("aten::amax", "aten::amin", zeros=Zeros.KEPT)
def average(trace: Trace, call: Call) -> list[Value]:
    x = call.values()[0]
    over = _dims(call, len(x.dims))
    for dim in over:
        trace.averages(call, x.dims[dim], f"a {call.name.removeprefix('aten::')}")
    return reduced(trace, call, x, over)


@rule("aten::cumsum", "aten::prod", zeros=Zeros.KEPT)
@rule("aten::max.default", "aten::min.default", "aten::max", "aten::min", zeros=Zeros.FIRST)
@rule("aten::max.dim", "aten::min.dim", zeros=Zeros.FIRST)
@rule("aten::softmax", "aten::_softmax", "aten::log_softmax", "aten::_log_softmax", "aten::_safe_softmax")
@rule("aten::cumprod", "aten::logcumsumexp", "aten::logsumexp", "aten::argmax", "aten::argmin", "aten::median.dim")
@rule("aten::all", "aten::argsort", "aten::sort", "aten::topk", "aten::kthvalue", "aten::diff")
def every_entry_counts(trace: Trace, call: Call) -> list[Value]:
    """The dimension it runs over stays: without one of its entries the others' results would change."""
    x = call.values()[0]
    over = _dims(call, len(x.dims))
    why = f"{call.where} runs over it"
    for dim in over:
        trace.units.pin(x.dims[dim], why)
    found = []
    for shape in call.shapes:
        if len(shape) == len(x.dims):
            sizes = zip(x.dims, shape, strict=True)
            dims = [trace.units.fixed(n, why) if d in over else v for d, (v, n) in enumerate(sizes)]
        else:
            dims = [labels for d, labels in enumerate(x.dims) if d not in over]
        found.append(Value(tuple(dims)))
    return found
