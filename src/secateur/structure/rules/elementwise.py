"""Element-wise operators: position i of every operand that isn't broadcast goes with position i of the output."""

from __future__ import annotations

from secateur.structure.trace import Call, Trace, Value, Zeros, rule
from secateur.structure.traced import Traced
from secateur.structure.units import Labels

ONE = "a dimension of size 1"


def aligned(trace: Traced, values: list[Value], shape: tuple[int, ...]) -> Value:
    """Operands broadcast to ``shape``: in each dimension those of full size leave together."""
    dims: list[Labels] = []
    for back, size in enumerate(reversed(shape), start=1):
        full = [v.dims[-back] for v in values if len(v.dims) >= back and len(v.dims[-back]) == size]
        if size == 1 or not full:
            # nobody has this dimension in full: it was made by broadcasting
            dims.append(full[0] if full else trace.units.fixed(size, ONE))
            continue
        for other in full[1:]:
            trace.units.join(full[0], other)
        dims.append(full[0])
    return Value(tuple(reversed(dims)))


@rule(
    "pointwise",
    "aten::clone",
    "aten::alias",
    "aten::contiguous",
    "aten::detach",
    "aten::_to_copy",
    "aten::to",
    "aten::copy",
    "aten::fill",
    "aten::dropout",
    "aten::alpha_dropout",
    "aten::feature_dropout",
    "aten::native_dropout",
    "aten::lift_fresh_copy",
    "aten::_conj",
    "aten::masked_fill",
    "aten::where",
    "aten::gelu",
    "aten::prelu",
    "aten::_prelu_kernel",
    "aten::rrelu",
    "aten::nan_to_num",
    "aten::zeros_like",
    "aten::ones_like",
    "aten::full_like",
    "aten::empty_like",
    "aten::rand_like",
    "aten::randn_like",
    "aten::zero",
    "aten::type_as",
    "aten::pow",
    "aten::relu6",
    "aten::hardswish",
    "aten::hardsigmoid",
    "aten::mish",
    "aten::log_sigmoid",
    "aten::log_sigmoid_forward",
    "aten::softshrink",
    "aten::hardshrink",
    "aten::hardtanh",
    "aten::bernoulli",
    "aten::max.other",
    "aten::min.other",
    "aten::_autocast_to_reduced_precision",
    "aten::__and__",
    "aten::__or__",
    "aten::__xor__",
    zeros=Zeros.POINTWISE,
)
def elementwise(trace: Trace, call: Call) -> Value | list[Value]:
    found = []
    for shape in call.shapes:
        values = call.values()
        if call.name in ("aten::prelu", "aten::_prelu_kernel"):
            values = [_channelwise(call["weight"], len(shape)), call["self"]]
        found.append(aligned(trace, values, shape))
    return found


def _channelwise(weight: Value, dims: int) -> Value:
    """A vector over the channels, as a tensor that broadcasts; one entry only belongs to no channel."""
    if len(weight.dims) != 1 or dims < 2:
        return weight
    one = weight.dims[0][:0]
    return Value(tuple([one, weight.dims[0], *[one] * (dims - 2)]))


@rule("aten::glu", zeros=Zeros.KEPT)
def glu(trace: Trace, call: Call) -> Value:
    value, dim = call["self"], call["dim"]
    half = len(value.dims[dim]) // 2
    trace.units.join(value.dims[dim][:half], value.dims[dim][half:])
    return value.with_dim(dim, value.dims[dim][:half])


@rule("aten::new_zeros", "aten::zeros", zeros=Zeros.MADE)
@rule(
    "aten::new_ones",
    "aten::new_full",
    "aten::new_empty",
    "aten::ones",
    "aten::full",
    "aten::empty",
    "aten::arange",
    "aten::linspace",
    "aten::eye",
    "aten::scalar_tensor",
    "aten::tril_indices",
    "aten::triu_indices",
    "aten::rand",
    "aten::randn",
)
def made(trace: Trace, call: Call) -> Value:
    """A tensor made of nothing: its size is an argument, which a cut can rewrite where all entries are the same."""
    uniform = call.name.rsplit("::")[-1].removeprefix("new_") in ("zeros", "ones", "full", "empty")
    if not uniform:
        return trace.fixed(call.shape, f"{call.where} makes it entry by entry")
    return Value(tuple(trace.units.fresh(n) if n > 1 else trace.units.fixed(n, ONE) for n in call.shape))
