"""Sums, means, maxima and soft-maxima."""

from __future__ import annotations

from secateur.structure.onnx.rules.moving import listed
from secateur.structure.onnx.trace import OnnxTrace, rule, shared
from secateur.structure.rules import reduction
from secateur.structure.traced import Call, NoRule, Value, Zeros

AVERAGES = {"ReduceMean": "aten::mean", "ReduceMax": "aten::amax", "ReduceMin": "aten::amin"}


@rule("ReduceSum", "ReduceSumSquare", "ReduceL1", "ReduceL2", *AVERAGES, settings=(1,), zeros=Zeros.KEPT)
@rule("ReduceLogSum", settings=(1,))
def reduced(trace: OnnxTrace, call: Call) -> list[Value] | Value:
    axes = listed(trace, call, "axes", 1)
    if not axes and call.get("noop_with_empty_axes"):
        return call["inputs"][0]
    function = reduction.average if call.name in AVERAGES else reduction.total
    name = AVERAGES.get(call.name, "aten::sum")
    return shared(function, trace, call, name, self=call["inputs"][0], dim=axes, keepdim=call.get("keepdims", 1))


@rule("ReduceProd", settings=(1,), zeros=Zeros.KEPT)
@rule("ReduceLogSumExp", settings=(1,))
def multiplied(trace: OnnxTrace, call: Call) -> list[Value]:
    return _every_entry(trace, call, listed(trace, call, "axes", 1))


@rule("ArgMax", "ArgMin")
@rule("TopK", settings=(1,))
def ranked(trace: OnnxTrace, call: Call) -> list[Value]:
    return _every_entry(trace, call, [call.get("axis", -1 if call.name == "TopK" else 0)])


@rule("CumSum", settings=(1,), zeros=Zeros.KEPT)
def cumulative(trace: OnnxTrace, call: Call) -> list[Value]:
    axes = listed(trace, call, "axis", 1)
    if axes is None:
        raise NoRule("its axis isn't given")
    return _every_entry(trace, call, axes)


@rule("Softmax", "LogSoftmax", "Hardmax")
def softmax(trace: OnnxTrace, call: Call) -> list[Value]:
    rank = len(call.shape)
    if trace.network.opset >= 13:
        return _every_entry(trace, call, [call.get("axis", -1)])
    # it was taken over all dimensions from the axis on
    return _every_entry(trace, call, list(range(call.get("axis", 1) % max(1, rank), rank)))


@rule("LpNormalization", zeros=Zeros.KEPT)
def scaled(trace: OnnxTrace, call: Call) -> Value:
    """Zeros don't count in the norm."""
    x = call["inputs"][0]
    trace.sums(call, x.dims[call.get("axis", -1)])
    return x


def _every_entry(trace: OnnxTrace, call: Call, axes: list[int] | None) -> list[Value]:
    x = call["inputs"][0]
    return shared(reduction.every_entry_counts, trace, call, call.name, self=x, dim=axes)
