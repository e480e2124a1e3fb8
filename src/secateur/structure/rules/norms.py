"""Normalisation. Over a dimension that is cut, statistics change: zeroing is then not the same as removing."""

from __future__ import annotations

from secateur.structure.trace import Call, NoRule, Trace, Value, Zeros, rule


@rule(
    "aten::batch_norm",
    "aten::_native_batch_norm_legit_no_training",
    "aten::_native_batch_norm_legit",
    "aten::native_batch_norm",
    "aten::cudnn_batch_norm",
    zeros=Zeros.NORMED,
)
def batch_norm(trace: Trace, call: Call) -> list[Value]:
    x, *others = call.values()
    channels = x.dims[1]
    for other in others:
        trace.units.join(channels, other.dims[0])
    _over_all_but_channels(trace, call, x)
    return [x, *(Value((channels,)) if s != (0,) else Value((channels[:0],)) for s in call.shapes[1:])]


def _over_all_but_channels(trace: Trace, call: Call, x: Value) -> None:
    """Statistics of this very input run over everything but its channels, as where weights are standardised."""
    own = call.get("training") or call.get("use_input_stats") or not call.get("running_mean")
    if own and "no_training" not in call.name:
        for labels in (x.dims[0], *x.dims[2:]):
            trace.averages(call, labels, "a standardisation")


@rule("aten::instance_norm", zeros=Zeros.NORMED)
def instance_norm(trace: Trace, call: Call) -> Value:
    x, *others = call.values()
    for other in others:
        trace.units.join(x.dims[1], other.dims[0])
    _over_all_but_channels(trace, call, x)
    return x


@rule("aten::layer_norm", "aten::native_layer_norm", zeros=Zeros.CENTRED)
@rule("aten::rms_norm", "aten::_fused_rms_norm", zeros=Zeros.NORMED)
def layer_norm(trace: Trace, call: Call) -> list[Value]:
    x = call["input"]
    count = len(call["normalized_shape"])
    over = x.dims[-count:]
    for labels in over:
        trace.averages(call, labels, "a layer norm")
    for other in call.values()[1:]:
        for mine, theirs in zip(over, other.dims, strict=True):
            trace.units.join(mine, theirs)
    ones = [trace.units.fixed(1, "a dimension of size 1")] * count
    return [x, *(Value((*x.dims[:-count], *ones)) for _ in call.shapes[1:])]


@rule("aten::group_norm", "aten::native_group_norm", zeros=Zeros.CENTRED)
def group_norm(trace: Trace, call: Call) -> list[Value]:
    x = call["input"]
    groups = call.get("num_groups") or call["group"]
    channels = x.dims[1]
    for other in call.values()[1:]:
        trace.units.join(channels, other.dims[0])
    # a channel leaves with its group, or with the same channel of every group
    group, inner = trace.units.split(channels, (groups, len(channels) // groups))
    for labels in (inner, *x.dims[2:]) if len(inner) > 1 else x.dims[2:]:
        # also behind the channels, where the inputs of weights lie that are standardised in groups
        trace.averages(call, labels, "a group norm")
    return [x, *(Value((x.dims[0], group)) for _ in call.shapes[1:])]


@rule("aten::local_response_norm")
def local_response_norm(trace: Trace, call: Call) -> Value:
    raise NoRule("it averages over neighbouring channels")


@rule("aten::_weight_norm")
def weight_norm(trace: Trace, call: Call) -> Value:
    """g * v / |v|, with one norm for every position along ``dim``. Zeros add nothing to the norms of others."""
    v, g = call["v"], call["g"]
    at = call.get("dim", 0)
    if not 0 <= at < len(v.dims):
        raise NoRule("its norm runs over all of the weight")
    trace.units.join(v.dims[at], g.dims[at])
    trace.undefined(v.dims[at], "a weight norm isn't finite where its parameters are 0")
    return v
