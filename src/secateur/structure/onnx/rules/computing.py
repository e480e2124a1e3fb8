"""Products, convolutions and norms: translated to the rules that torch graphs have."""

from __future__ import annotations

from secateur.structure.onnx.trace import OnnxTrace, operands, rule, shared
from secateur.structure.rules import contraction, convolution, norms
from secateur.structure.rules.elementwise import aligned
from secateur.structure.traced import Call, NoRule, Value, Zeros

SPATIAL = "a spatial dimension"


@rule("Conv", "ConvTranspose", zeros=Zeros.WEIGHED)
def convolve(trace: OnnxTrace, call: Call) -> Value:
    x, weight, bias = operands(call, 3)
    transposed = call.name == "ConvTranspose"
    trace.makes(weight.dims[1 if transposed else 0])
    function = convolution.transposed_convolution if transposed else convolution.convolution
    name = "aten::conv_transpose2d" if transposed else "aten::conv2d"
    return shared(function, trace, call, name, input=x, weight=weight, bias=bias, groups=call.get("group", 1))


@rule("MatMul", zeros=Zeros.MULTIPLIED)
@rule("com.microsoft::FusedMatMul")
def matmul(trace: OnnxTrace, call: Call) -> Value:
    if call.name != "MatMul":
        raise NoRule("it transposes on the way")
    return _product(trace, call, *call["inputs"])


def _product(trace: OnnxTrace, call: Call, a: Value, b: Value) -> Value:
    for weight, labels in ((a, a.dims[-2:-1]), (b, b.dims[-1:] if len(b.dims) > 1 else ())):
        if labels and any(weight is known for known in trace.parameters.values()):
            trace.makes(labels[0])
    return shared(contraction.matmul, trace, call, "aten::matmul", self=a, other=b)


@rule("Gemm", zeros=Zeros.MULTIPLIED)
def gemm(trace: OnnxTrace, call: Call) -> Value:
    a, b, c = operands(call, 3)
    trace.makes(b.dims[0 if call.get("transB") else 1])
    a, b = (Value(v.dims[::-1]) if call.get(flag) else v for v, flag in ((a, "transA"), (b, "transB")))
    product = shared(contraction.matmul, trace, call, "aten::mm", self=a, mat2=b)
    return aligned(trace, [product, *([c] if c is not None else [])], call.shape)


@rule("Einsum", zeros=Zeros.CONTRACTED)
def einsum(trace: OnnxTrace, call: Call) -> Value:
    return shared(contraction.einsum, trace, call, "aten::einsum", equation=call["equation"], tensors=call["inputs"])


@rule("BatchNormalization", zeros=Zeros.NORMED)
def batch_norm(trace: OnnxTrace, call: Call) -> list[Value]:
    x, weight, bias, mean, var = call["inputs"]
    given = {"input": x, "weight": weight, "bias": bias, "running_mean": mean, "running_var": var}
    return shared(norms.batch_norm, trace, call, "aten::batch_norm", **given, training=call.get("training_mode", 0))


@rule("InstanceNormalization", zeros=Zeros.NORMED)
def instance_norm(trace: OnnxTrace, call: Call) -> Value:
    x, weight, bias = call["inputs"]
    return shared(norms.instance_norm, trace, call, "aten::instance_norm", input=x, weight=weight, bias=bias)


@rule("LayerNormalization", zeros=Zeros.CENTRED)
@rule("RMSNormalization", "SimplifiedLayerNormalization", zeros=Zeros.NORMED)
def layer_norm(trace: OnnxTrace, call: Call) -> list[Value]:
    x, *others = call["inputs"]
    over = x.shape[call.get("axis", -1) :]
    given = {str(at): other for at, other in enumerate(others) if other is not None}
    if any(other.shape != over for other in given.values()):
        raise NoRule("its scale broadcasts")
    return shared(norms.layer_norm, trace, call, "aten::layer_norm", input=x, normalized_shape=over, **given)


@rule("GroupNormalization", zeros=Zeros.CENTRED)
def group_norm(trace: OnnxTrace, call: Call) -> list[Value]:
    x, *others = call["inputs"]
    groups = call["num_groups"]
    by_channel = trace.network.opset >= 21
    given = {str(at): other for at, other in enumerate(others)} if by_channel else {}
    found = shared(norms.group_norm, trace, call, "aten::group_norm", input=x, num_groups=groups, **given)
    for other in () if by_channel else others:
        # the first version of the operator scales whole groups
        trace.units.join(trace.units.split(x.dims[1], (groups, len(x.dims[1]) // groups))[0], other.dims[0])
    return found


@rule("MeanVarianceNormalization", zeros=Zeros.CENTRED)
def standardized(trace: OnnxTrace, call: Call) -> Value:
    x = call["inputs"][0]
    for axis in call.get("axes", [0, 2, 3]):
        trace.averages(call, x.dims[axis], "a standardisation")
    return x


@rule("LRN")
def local_response(trace: OnnxTrace, call: Call) -> Value:
    raise NoRule("it averages over neighbouring channels")


@rule("AveragePool", "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool", "GridSample", "LpPool", zeros=Zeros.KEPT)
@rule("MaxPool", zeros=Zeros.FIRST)
def pooled(trace: OnnxTrace, call: Call) -> list[Value]:
    x, *others = call["inputs"]
    trace.pin(Value(x.dims[2:]), SPATIAL)
    trace.pin([v for v in others if v is not None], SPATIAL)
    return [Value((*x.dims[:2], *(trace.units.fixed(n, SPATIAL) for n in shape[2:]))) for shape in call.shapes]


@rule("Resize", "Upsample", settings=(1, 2, 3), zeros=Zeros.KEPT)
def resized(trace: OnnxTrace, call: Call) -> Value:
    """Where the size stays the dimension goes through, be it in front or behind."""
    x = call["inputs"][0]
    dims = []
    for labels, size in zip(x.dims, call.shape, strict=True):
        if len(labels) != size:
            trace.units.pin(labels, SPATIAL)
        dims.append(labels if len(labels) == size else trace.units.fixed(size, SPATIAL))
    return Value(tuple(dims))


@rule("DepthToSpace", "SpaceToDepth", zeros=Zeros.KEPT)
def blocks(trace: OnnxTrace, call: Call) -> Value:
    x, size = call["inputs"][0], call["blocksize"]
    if call.name == "DepthToSpace" and call.get("mode", "DCR") == "CRD":
        return shared(convolution.pixel_shuffle, trace, call, "aten::pixel_shuffle", self=x, upscale_factor=size)
    # channel k * C + c of the many belongs to channel c of the few
    trace.pin(Value(x.dims[2:]), SPATIAL)
    made = list(trace.fixed(call.shape, SPATIAL).dims)
    made[0] = x.dims[0]
    if call.name == "SpaceToDepth":
        made[1] = x.dims[1][list(range(len(x.dims[1]))) * size**2]
    else:
        made[1] = x.dims[1][: call.shape[1]]
        trace.units.join(x.dims[1], made[1][list(range(call.shape[1])) * size**2])
    return Value(tuple(made))
