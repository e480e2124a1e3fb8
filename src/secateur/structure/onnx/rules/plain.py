"""Element-wise operators, and those that make tensors of nothing."""

from __future__ import annotations

from secateur.structure.onnx.trace import OnnxTrace, rule
from secateur.structure.rules.elementwise import aligned
from secateur.structure.traced import Call, Value, Zeros

UNARY = (
    "Abs Acos Acosh Asin Asinh Atan Atanh Bernoulli BitwiseNot Cast Ceil Celu Cos Cosh Elu Erf Exp Floor Gelu"
    " HardSigmoid HardSwish Identity IsInf IsNaN LeakyRelu Log Mish Neg Not Reciprocal Relu Round Selu Shrink Sigmoid"
    " Sign Sin Sinh Softplus Softsign Sqrt Swish Tan Tanh ThresholdedRelu RandomNormalLike RandomUniformLike"
)
BROADCASTING = (
    "Add And BitShift BitwiseAnd BitwiseOr BitwiseXor Div Equal Greater GreaterOrEqual Less LessOrEqual Max Mean Min"
    " Mod Mul Or PRelu Pow Sub Sum Where Xor com.microsoft::FastGelu com.microsoft::BiasGelu"
)


@rule(*UNARY.split(), zeros=Zeros.POINTWISE)
# onnx's own evaluator can't try these
@rule("com.microsoft::Gelu", "com.microsoft::QuickGelu", zeros=Zeros.KEPT)
def unary(trace: OnnxTrace, call: Call) -> Value:
    return call["inputs"][0]


@rule(*BROADCASTING.split(), zeros=Zeros.POINTWISE)
def broadcasting(trace: OnnxTrace, call: Call) -> Value:
    return aligned(trace, call.values(), call.shape)


@rule("Clip", "Dropout", settings=(1, 2), zeros=Zeros.POINTWISE)
@rule("CastLike", zeros=Zeros.POINTWISE)
def with_settings(trace: OnnxTrace, call: Call) -> list[Value]:
    return [call["inputs"][0]] * len(call.shapes)


@rule("QuantizeLinear", "DequantizeLinear")
def quantized(trace: OnnxTrace, call: Call) -> Value:
    """Scales and zero points lie along one axis, or there is one of each."""
    x, *others = call["inputs"]
    for other in others:
        if other is not None and other.shape not in ((), (1,)):
            labels = x.dims[call.get("axis", 1)]
            if len(other.dims) == 1 and len(other.dims[0]) == len(labels):
                trace.units.join(labels, other.dims[0])
            else:
                trace.pin([x, other], f"{call.where} scales it in blocks")
    return x


@rule("ConstantOfShape", settings=(0,))
def filled(trace: OnnxTrace, call: Call) -> Value:
    """All its entries are the same, so its size can follow a cut."""
    return trace.fresh(call.shape)


@rule("Shape", "Size", "Range", "RandomNormal", "RandomUniform", "EyeLike", "NonZero", "Constant")
def made(trace: OnnxTrace, call: Call) -> Value:
    why = f"{call.where} makes it entry by entry"
    if call.name == "NonZero":
        trace.pin(call.values(), why)
    return trace.fixed(call.shape, why)
