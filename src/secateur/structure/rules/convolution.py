"""Convolutions, pooling, resizing. A group of a grouped convolution is an outer unit, its channels are inner ones."""

from __future__ import annotations

import numpy as np

from secateur.structure.trace import Call, NoRule, Trace, Value, Zeros, rule
from secateur.structure.traced import BOTH
from secateur.structure.units import Labels

SPATIAL = "a spatial dimension"


@rule("aten::conv1d", "aten::conv2d", "aten::conv3d", "aten::convolution", zeros=Zeros.WEIGHED)
def convolution(trace: Trace, call: Call) -> Value:
    if call.get("transposed"):
        return transposed_convolution(trace, call)
    x, weight, bias, groups = call["input"], call["weight"], call["bias"], call["groups"]
    channels, spatial = _channels(trace, call, x, len(weight.dims) - 2)
    outputs, inputs = weight.dims[:2]
    trace.sums(call, inputs, BOTH)
    if groups == 1:
        trace.units.join(channels, inputs)
    else:
        group, inner = trace.units.split(channels, (groups, len(inputs)))
        trace.units.join(inner, inputs)
        outer, _ = trace.units.split(outputs, (groups, len(outputs) // groups))
        trace.units.join(group, outer)
    return _output(trace, call, x, spatial, weight, bias, outputs, (outputs, inputs))


@rule("aten::conv_transpose1d", "aten::conv_transpose2d", "aten::conv_transpose3d", zeros=Zeros.WEIGHED)
def transposed_convolution(trace: Trace, call: Call) -> Value:
    x, weight, bias, groups = call["input"], call["weight"], call["bias"], call["groups"]
    channels, spatial = _channels(trace, call, x, len(weight.dims) - 2)
    inputs, outputs = weight.dims[:2]
    trace.units.join(channels, inputs)
    trace.sums(call, inputs, BOTH)
    made = outputs
    if groups > 1:
        group, _ = trace.units.split(inputs, (groups, len(inputs) // groups))
        made = trace.units.grid([group, outputs])
    return _output(trace, call, x, spatial, weight, bias, made, (inputs, outputs))


def _channels(trace: Trace, call: Call, x: Value, spatial: int) -> tuple[Labels, int]:
    """Labels of the channels, and the number of spatial dimensions, which stay."""
    for labels in x.dims[-spatial:] if spatial else ():
        trace.units.pin(labels, SPATIAL)
    return x.dims[-spatial - 1], spatial


def _output(
    trace: Trace,
    call: Call,
    x: Value,
    spatial: int,
    weight: Value,
    bias: Value | None,
    channels: Labels,
    factors: tuple[Labels, Labels],
) -> Value:
    for labels in weight.dims[2:]:
        trace.units.pin(labels, "a kernel's size")
    if bias is not None:
        trace.units.join(channels, bias.dims[0])
    places = tuple(trace.units.fixed(n, SPATIAL) for n in call.shape[-spatial:])
    over = x.dims[-spatial:] if call.name.startswith("aten::conv_transpose") or call.get("transposed") else places
    trace.count(call, *x.dims[: -spatial - 1], *over, *factors, *weight.dims[2:])
    return Value((*x.dims[: -spatial - 1], channels, *places))


@rule(
    "aten::max_pool1d",
    "aten::max_pool2d",
    "aten::max_pool3d",
    "aten::max_pool2d_with_indices",
    "aten::max_pool3d_with_indices",
    "aten::adaptive_max_pool2d",
    "aten::adaptive_max_pool3d",
    zeros=Zeros.FIRST,
)
@rule(
    "aten::avg_pool1d",
    "aten::avg_pool2d",
    "aten::avg_pool3d",
    "aten::adaptive_avg_pool1d",
    "aten::adaptive_avg_pool2d",
    "aten::adaptive_avg_pool3d",
    "aten::_adaptive_avg_pool2d",
    "aten::_adaptive_avg_pool3d",
    "aten::upsample_nearest1d",
    "aten::upsample_nearest2d",
    "aten::upsample_nearest3d",
    "aten::_upsample_nearest_exact2d",
    "aten::upsample_linear1d",
    "aten::upsample_bilinear2d",
    "aten::upsample_bicubic2d",
    "aten::upsample_trilinear3d",
    "aten::_upsample_bilinear2d_aa",
    "aten::_upsample_bicubic2d_aa",
    "aten::grid_sampler",
    "aten::grid_sampler_2d",
    "aten::grid_sampler_3d",
    "aten::reflection_pad1d",
    "aten::reflection_pad2d",
    "aten::replication_pad1d",
    "aten::replication_pad2d",
    "aten::lp_pool2d",
    zeros=Zeros.KEPT,
)
def spatial(trace: Trace, call: Call) -> list[Value]:
    """Channels go through; the dimensions behind them are worked on and stay."""
    x = call.values()[0]
    behind = len(x.dims) - 2 if call.name == "aten::grid_sampler" else _spatial_dims(call.name)
    for labels in x.dims[-behind:]:
        trace.units.pin(labels, SPATIAL)
    for other in call.values()[1:]:
        for labels in other.dims:
            trace.units.pin(labels, SPATIAL)
    front = x.dims[:-behind]
    return [Value((*front, *(trace.units.fixed(n, SPATIAL) for n in s[len(front) :]))) for s in call.shapes]


def _spatial_dims(name: str) -> int:
    digits = [c for c in name if c in "123"]
    return int(digits[0]) if digits else 2


@rule("aten::constant_pad_nd", "aten::pad", zeros=Zeros.PADDED)
def pad(trace: Trace, call: Call) -> Value:
    """Where nothing is added a dimension goes through. Added entries belong to nobody and stay."""
    x, amounts = call["self"], list(call["pad"])
    dims = list(x.dims)
    for back in range(len(amounts) // 2):
        before, after = amounts[2 * back : 2 * back + 2]
        dim = len(dims) - 1 - back
        if before == after == 0:
            continue
        if call.get("mode", "constant") != "constant":
            trace.units.pin(dims[dim], SPATIAL)
            dims[dim] = trace.units.fixed(call.shape[dim], SPATIAL)
            continue
        inside = dims[dim][max(0, -before) : len(dims[dim]) - max(0, -after)]
        added = [trace.units.fixed(max(0, n), "padding") for n in (before, after)]
        dims[dim] = np.concatenate([added[0], inside, added[1]])
    return Value(tuple(dims))


@rule("aten::pixel_shuffle", "aten::pixel_unshuffle", zeros=Zeros.KEPT)
def pixel_shuffle(trace: Trace, call: Call) -> Value:
    x = call["self"]
    factor = call.get("upscale_factor") or call["downscale_factor"]
    shuffle = call.name == "aten::pixel_shuffle"
    for labels in x.dims[-2:]:
        trace.units.pin(labels, SPATIAL)
    channels = x.dims[-3]
    # position c * f² + k of the many channels belongs to channel c of the few
    few = channels[:: factor**2] if shuffle else channels
    many = np.repeat(few, factor**2)
    if shuffle:
        trace.units.join(channels, many)
    spatial = tuple(trace.units.fixed(n, SPATIAL) for n in call.shape[-2:])
    return Value((*x.dims[:-3], few if shuffle else many, *spatial))


@rule("aten::channel_shuffle", "aten::native_channel_shuffle", zeros=Zeros.KEPT)
def channel_shuffle(trace: Trace, call: Call) -> Value:
    x, groups = call["self"], call["groups"]
    count = len(x.dims[1])
    if count % groups:
        raise NoRule("its channels don't divide into groups")
    group, inner = trace.units.split(x.dims[1], (groups, count // groups))
    trace.units.join(x.dims[1], trace.units.grid([group, inner]))
    return x.with_dim(1, trace.units.grid([inner, group]))


@rule("aten::im2col", "aten::col2im", zeros=Zeros.KEPT)
def patches(trace: Trace, call: Call) -> Value:
    """Channel c of an image is rows c·k² … of its patches."""
    x = call["self"]
    size = int(np.prod(call["kernel_size"]))
    channels = x.dims[1] if call.name == "aten::im2col" else None
    if channels is not None:
        rows = np.repeat(channels, size)
    else:
        rows = x.dims[1][::size]
        trace.units.join(x.dims[1], np.repeat(rows, size))
    for labels in x.dims[2:]:
        trace.units.pin(labels, SPATIAL)
    return Value((x.dims[0], rows, *(trace.units.fixed(n, SPATIAL) for n in call.shape[2:])))
