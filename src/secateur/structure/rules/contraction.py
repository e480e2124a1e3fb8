"""Products of matrices: a summed index joins its two operands, a free one goes on into the output."""

from __future__ import annotations

from secateur.structure.equations import spelled
from secateur.structure.rules.elementwise import aligned
from secateur.structure.trace import Call, NoRule, Trace, Value, Zeros, rule
from secateur.structure.traced import BOTH
from secateur.structure.units import Labels


@rule("aten::linear", zeros=Zeros.WEIGHED)
def linear(trace: Trace, call: Call) -> Value:
    x, weight, bias = call["input"], call["weight"], call["bias"]
    if len(weight.dims) != 2:
        raise NoRule("its weight is a vector")
    outputs, inputs = weight.dims
    trace.units.join(x.dims[-1], inputs)
    trace.sums(call, inputs, BOTH)
    if bias is not None:
        trace.units.join(outputs, bias.dims[0])
    trace.count(call, *x.dims[:-1], outputs, inputs)
    return Value((*x.dims[:-1], outputs))


@rule("aten::matmul", "aten::mm", "aten::bmm", "aten::mv", "aten::dot", "aten::vdot", zeros=Zeros.MULTIPLIED)
def matmul(trace: Trace, call: Call) -> Value:
    a = call["self"]
    b = next(call[n] for n in ("other", "mat2", "vec", "tensor") if n in call.arguments)
    return _product(trace, call, a, b, BOTH)


@rule("aten::addmm", "aten::baddbmm", "aten::addmv", zeros=Zeros.MULTIPLIED)
@rule("aten::addbmm")
def add_product(trace: Trace, call: Call) -> Value:
    operands = call.values()
    if call.name == "aten::addbmm":
        raise NoRule("it sums over the batch")
    product = _product(trace, call, operands[1], operands[2], slice(1, 3))
    return aligned(trace, [product, operands[0]], call.shape)


def _product(trace: Trace, call: Call, a: Value, b: Value, factors: slice) -> Value:
    rows, columns = a.dims[-2:-1], b.dims[-1:] if len(b.dims) > 1 else ()
    summed_a, summed_b = a.dims[-1], b.dims[max(0, len(b.dims) - 2)]
    trace.units.join(summed_a, summed_b)
    trace.sums(call, summed_a, factors)
    shape = call.shape[: len(call.shape) - len(rows) - len(columns)]
    batch = aligned(trace, [Value(a.dims[:-2]), Value(b.dims[:-2])], shape)
    trace.count(call, *batch.dims, *rows, summed_a, *columns)
    if len(a.dims) > 2 and len(b.dims) > 2:
        # two activations with a batch of matrices: attention of some kind, and these are inside its heads
        trace.lanes += [summed_a, *rows, *columns]
    return Value((*batch.dims, *rows, *columns))


@rule("aten::einsum", zeros=Zeros.CONTRACTED)
def einsum(trace: Trace, call: Call) -> Value:
    try:
        inputs, output = spelled(call["equation"], [len(v.dims) for v in call["tensors"]])
    except ValueError as error:
        raise NoRule(str(error)) from None
    by_letter: dict[str, Labels] = {}
    for letters, value in zip(inputs, call["tensors"], strict=True):
        for letter, labels in zip(letters, value.dims, strict=True):
            known = by_letter.setdefault(letter, labels)
            if len(known) != len(labels):
                raise NoRule("it broadcasts a dimension")
            trace.units.join(known, labels)
    trace.count(call, *by_letter.values())
    for letter in by_letter.keys() - set(output):
        trace.sums(call, by_letter[letter])
    if len(inputs) == 2 and len({*inputs[0], *inputs[1]} & set(output)) > 3:
        trace.lanes += [by_letter[c] for c in by_letter if not all(c in part for part in inputs)]
    return Value(tuple(by_letter[letter] for letter in output))


@rule("aten::bilinear")
def bilinear(trace: Trace, call: Call) -> Value:
    x, y, weight, bias = call["input1"], call["input2"], call["weight"], call["bias"]
    trace.units.join(x.dims[-1], weight.dims[1])
    trace.units.join(y.dims[-1], weight.dims[2])
    for labels in weight.dims[1:]:
        trace.sums(call, labels, slice(3))
    if bias is not None:
        trace.units.join(weight.dims[0], bias.dims[0])
    trace.count(call, *x.dims[:-1], *weight.dims)
    return Value((*x.dims[:-1], weight.dims[0]))


@rule("aten::embedding", zeros=Zeros.KEPT)
def embedding(trace: Trace, call: Call) -> Value:
    weight, indices = call["weight"], call["indices"]
    trace.units.pin(weight.dims[0], f"{call.where} looks its rows up")
    return Value((*indices.dims, weight.dims[1]))
