"""Every operator kind in a small net: a layer makes channels, the operator passes them on, a layer reads them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnx_models import Net, close, feeds_for, holds, random_cut, run
from secateur.structure.onnx import cut_onnx, mask_onnx, onnx_anatomy
from secateur.structure.onnx.reference import reference_onnx

Body = Callable[[Net, str], str]

# [batch, 8 channels, 6, 6] → the same number of channels
IMAGES: dict[str, Body] = {
    **{
        k: lambda net, x, k=k: net(k, x)
        for k in ("Relu", "Sigmoid", "Elu", "Softplus", "Neg", "Abs", "Exp", "Identity")
    },
    "Cast": lambda net, x: net("Cast", net("Cast", x, to=11), to=1),
    "Dropout": lambda net, x: net("Dropout", x),
    "Clip": lambda net, x: net("Clip", x, net.constant(np.float32(-1))),
    "PRelu": lambda net, x: net("PRelu", x, net.weight(8, 1, 1)),
    "PRelu shared": lambda net, x: net("PRelu", x, net.weight(1, 1, 1)),
    "Mul": lambda net, x: net("Mul", x, net.weight(1, 8, 1, 1)),
    "Max": lambda net, x: net("Max", x, net.conv(x, 8, 8, name="b"), net.weight(6)),
    "Where": lambda net, x: net("Where", net("Greater", x, net.weight(8, 1, 1)), x, net.conv(x, 8, 8)),
    "InstanceNormalization": lambda net, x: net("InstanceNormalization", x, net.weight(8), net.weight(8)),
    "MeanVarianceNormalization": lambda net, x: net("MeanVarianceNormalization", x, axes=[2, 3]),
    "GroupNormalization": lambda net, x: net("GroupNormalization", x, net.weight(8), net.weight(8), num_groups=4),
    "AveragePool": lambda net, x: net("AveragePool", x, kernel_shape=[2, 2]),
    "LpPool": lambda net, x: net("LpPool", x, kernel_shape=[2, 2]),
    "GlobalMaxPool": lambda net, x: net("GlobalMaxPool", x),
    "Resize scales": lambda net, x: net("Resize", x, "", net.constant(np.float32([1, 1, 2, 2])), mode="nearest"),
    "Resize sizes": lambda net, x: net("Resize", x, "", "", net.ints(2, 8, 9, 9), mode="linear"),
    "Pad": lambda net, x: net("Pad", x, net.ints(0, 0, 1, 1, 0, 0, 1, 1)),
    "Pad reflect": lambda net, x: net("Pad", x, net.ints(0, 0, 1, 1, 0, 0, 1, 1), mode="reflect"),
    "Pad channels": lambda net, x: net(
        "Pad", net("Slice", x, net.ints(1), net.ints(7), net.ints(1)), net.ints(0, 2, 0, 0, 0, 0, 0, 0)
    ),
    "Pad away": lambda net, x: net.conv(net("Pad", x, net.ints(0, -2, 0, 0, 0, -1, 0, 0)), 5, 8),
    "Transpose": lambda net, x: net(
        "Transpose", net("Tanh", net("Transpose", x, perm=[0, 2, 3, 1])), perm=[0, 3, 1, 2]
    ),
    "Reshape": lambda net, x: net("Reshape", net("Reshape", x, net.ints(2, 8, 36)), net.ints(2, 8, 6, 6)),
    "Squeeze": lambda net, x: net("Squeeze", net("Unsqueeze", x, net.ints(1)), net.ints(1)),
    "Concat": lambda net, x: net("Concat", *net("Split", x, net.ints(3, 5), axis=1, outputs=2), axis=1),
    "Split": lambda net, x: net("Concat", *net("Split", x, axis=1, outputs=4, num_outputs=4)[::-1], axis=1),
    "Slice": lambda net, x: net.conv(net("Slice", x, net.ints(-6), net.ints(1 << 62), net.ints(1)), 6, 8),
    "Slice every second": lambda net, x: net.conv(
        net("Slice", x, net.ints(1, 0), net.ints(8, 5), net.ints(1, 2), net.ints(2, 1)), 4, 8
    ),
    "Slice backwards": lambda net, x: net("Slice", x, net.ints(-1), net.ints(-(1 << 62)), net.ints(1), net.ints(-1)),
    "Gather": lambda net, x: net.conv(net("Gather", x, net.ints(5, 0, 2, 2, -1), axis=1), 5, 8),
    "Gather one": lambda net, x: net.conv(
        net("Unsqueeze", net("Gather", x, net.constant(np.int64(3)), axis=2), net.ints(2)), 8, 8
    ),
    "Expand": lambda net, x: net("Mul", x, net("Expand", net.weight(1, 1), net.ints(2, 8, 6, 6))),
    "ConstantOfShape": lambda net, x: net("Add", x, net("ConstantOfShape", net.ints(2, 8, 6, 6))),
    "Tile": lambda net, x: net.conv(net("Tile", x, net.ints(1, 2, 1, 1)), 16, 8),
    "ReduceMean": lambda net, x: net("ReduceMean", x, net.ints(2, 3)),
    "ReduceMean channels": lambda net, x: net("Sub", x, net("ReduceMean", x, net.ints(1))),
    "ReduceMax channels": lambda net, x: net("Mul", x, net("ReduceMax", net("Relu", x), net.ints(1))),
    "ReduceSum channels": lambda net, x: net("Add", x, net("ReduceSum", x, net.ints(1))),
    "ReduceL2": lambda net, x: net("Div", x, net("Add", net("ReduceL2", x, net.ints(1)), net.constant(np.float32(1)))),
    "LpNormalization": lambda net, x: net("LpNormalization", x, axis=1, p=2),
    "Softmax in space": lambda net, x: net("Softmax", x, axis=3),
    "CumSum": lambda net, x: net("CumSum", x, net.constant(np.int64(2))),
    "Trilu": lambda net, x: net("Trilu", x),
    "ConvTranspose": lambda net, x: net("ConvTranspose", x, net.weight(8, 8, 2, 2), net.weight(8)),
    "ConvTranspose grouped": lambda net, x: net("ConvTranspose", x, net.weight(8, 4, 2, 2), net.weight(8), group=2),
    "Quantize": lambda net, x: net(
        "DequantizeLinear",
        net("QuantizeLinear", x, net.constant(np.float32(0.05)), net.constant(np.int8(0))),
        net.constant(np.float32(0.05)),
        net.constant(np.int8(0)),
    ),
    "GridSample": lambda net, x: net("GridSample", x, net.weight(2, 3, 3, 2)),
    "GatherND": lambda net, x: net(
        "Unsqueeze",
        net(
            "Transpose",
            net("GatherND", net("Transpose", x, perm=[2, 3, 0, 1]), net.constant(np.array([[0, 1], [2, 2]]))),
            perm=[1, 2, 0],
        ),
        net.ints(3),
    ),
    "ScatterND": lambda net, x: net(
        "Transpose",
        net("ScatterND", net("Transpose", x, perm=[2, 3, 0, 1]), net.constant(np.array([[0, 1]])), net.weight(1, 2, 8)),
        perm=[2, 3, 0, 1],
    ),
    "Gather by constants": lambda net, x: net(
        "Gather", x, net("Squeeze", net("NonZero", net.weight(8, positive=True)), net.ints(0)), axis=1
    ),
    "Einsum": lambda net, x: net("Einsum", x, net.weight(8, 8), equation="bchw,cd->bdhw"),
}


@pytest.mark.parametrize("name", IMAGES)
def test_operator_on_images(name: str) -> None:
    net = Net(2, 3, 6, 6, opset=21 if name == "GroupNormalization" else 18)
    made = net.conv("x", 3, 8, name="a")
    read = net.conv(IMAGES[name](net, made), 8, 3, kernel=1, name="z")
    # a channel of zeros has no variance, so a mask alone gives 0 / 0 there
    # and ONNX itself doesn't infer the shape behind a group norm
    shape = [2, 3, 6, 6] if name == "GroupNormalization" else None
    anatomy = holds(net.model(read, shape=shape), masked=name != "MeanVarianceNormalization")
    assert not anatomy.trace.unknown
    assert any(part.tensor == "a.weight" for group in anatomy.of_kind("channel") for part in group.slices)


# [batch, 5, 8] → [batch, 5, 8]
SEQUENCES: dict[str, Body] = {
    "MatMul": lambda net, x: net("MatMul", x, net.weight(8, 8)),
    "MatMul left": lambda net, x: net(
        "Transpose", net("MatMul", net.weight(8, 8), net("Transpose", x, perm=[0, 2, 1])), perm=[0, 2, 1]
    ),
    "MatMul vector": lambda net, x: net("Add", x, net("Unsqueeze", net("MatMul", x, net.weight(8)), net.ints(-1))),
    "LayerNormalization": lambda net, x: net("LayerNormalization", x, net.weight(8), net.weight(8)),
    "Flatten": lambda net, x: net(
        "Reshape", net("Gemm", net("Flatten", x), net.weight(40, 40), net.weight(40)), net.ints(-1, 5, 8)
    ),
    "Softmax of scores": lambda net, x: net(
        "MatMul", net("Softmax", net("MatMul", x, net("Transpose", x, perm=[0, 2, 1]))), x
    ),
    "ArgMax": lambda net, x: net("Add", x, net("Cast", net("ArgMax", net.dense(x, 8, 6), axis=2), to=1)),
    "TopK": lambda net, x: net("Add", x, net("TopK", net.dense(x, 8, 6), net.ints(1), outputs=2)[0]),
    "Gated": lambda net, x: net("Mul", *net("Split", net.dense(x, 8, 16), net.ints(8, 8), axis=-1, outputs=2)),
    "GatherElements": lambda net, x: net(
        "GatherElements", x, net.constant(np.zeros((2, 5, 8), dtype=np.int64)), axis=1
    ),
    "Embedding": lambda net, x: net(
        "Add", x, net("Gather", net.weight(9, 8), net("Range", *[net.constant(np.int64(n)) for n in (0, 5, 1)]))
    ),
    "Transposed Gemm": lambda net, x: net(
        "Add", x, net("Gemm", net.weight(8, 1), net.weight(8, 8), net.weight(8), transA=1, transB=1)
    ),
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_operator_on_sequences(name: str) -> None:
    net = Net(2, 5, 4)
    read = net.dense(SEQUENCES[name](net, net.dense("x", 4, 8, name="a")), 8, 3, name="z")
    anatomy = holds(net.model(read))
    assert not anatomy.trace.unknown
    assert any(part.tensor == "a.weight" for group in anatomy.of_kind("channel") for part in group.slices)


@pytest.mark.parametrize("opset", [9, 11, 12])
def test_settings_that_older_operators_hold_as_attributes(opset: int) -> None:
    net = Net(2, 3, 6, 6, opset=opset)
    x = net.conv("x", 3, 8, name="a")
    first, second = net("Split", x, axis=1, outputs=2, split=[3, 5])
    x = net("Concat", net("Relu", first), net("Squeeze", net("Unsqueeze", second, axes=[0]), axes=[0]), axis=1)
    if opset < 10:
        x = net("Slice", x, starts=[1, 0], ends=[7, 100], axes=[1, 2])
        x = net("Pad", x, pads=[0, 0, 1, 1, 0, 0, 0, 0])
    else:
        x = net("Slice", x, net.ints(1, 0), net.ints(7, 100), net.ints(1, 2))
    x = net("ReduceMean", x, axes=[2, 3], keepdims=0)
    anatomy = onnx_anatomy(net.model(net("Softmax", net("MatMul", x, net.weight(6, 3)))))
    assert not anatomy.trace.unknown
    for seed in range(3):
        removed = random_cut(anatomy, seed)
        cut, masked = cut_onnx(anatomy, removed), mask_onnx(anatomy, removed)
        onnx.checker.check_model(cut, full_check=True)
        close(run(cut, feeds_for(anatomy)), run(masked, feeds_for(anatomy)))


def test_group_norm_whose_scales_are_of_groups() -> None:
    net = Net(2, 3, 6, 6, opset=18)
    x = net("GroupNormalization", net.conv("x", 3, 8, name="a"), net.weight(4), net.weight(4), num_groups=4)
    anatomy = onnx_anatomy(net.model(net.conv(x, 8, 3, name="z")))
    assert {g.units: bool(g.inexact) for g in anatomy.groups} == {4: False, 2: True}
    for removed in ({g.name: [1]} for g in anatomy.groups):
        # onnx's checker calls this version of the operator deprecated
        found, expected = cut_onnx(anatomy, removed), reference_onnx(anatomy, removed)
        close(run(found, feeds_for(anatomy)), run(expected, feeds_for(anatomy)))


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("heads", ["outer", "inner"])
def test_attention_as_one_operator(kv_heads: int, merged: bool, heads: str) -> None:
    net = Net(2, 5, 6, opset=23)
    widths = {"q": 12, "k": 3 * kv_heads, "v": 3 * kv_heads}
    q, k, v = (net.dense("x", 6, width, name=name) for name, width in widths.items())
    if merged:
        mixed = net("Attention", q, k, v, q_num_heads=4, kv_num_heads=kv_heads, is_causal=1)
    else:
        q, k, v = (net("Reshape", t, net.ints(2, 5, -1, 3)) for t in (q, k, v))
        q, k, v = (net("Transpose", t, perm=[0, 2, 1, 3]) for t in (q, k, v))
        mixed = net("Reshape", net("Transpose", net("Attention", q, k, v), perm=[0, 2, 1, 3]), net.ints(0, 0, -1))
    anatomy = holds(net.model(net.dense(mixed, 12, 3, name="o")), heads=heads)
    units = {g.units for g in anatomy.groups if g.frozen is None}
    assert units == ({3} if heads == "inner" else {kv_heads, 4 // kv_heads} - {1})


FROZEN = {
    "LRN": lambda net, x: net("LRN", x, size=3),
    "ScatterElements": lambda net, x: net(
        "ScatterElements", x, net.constant(np.zeros((2, 8, 1, 1), dtype=np.int64)), net.weight(2, 8, 1, 1), axis=3
    ),
    "NonZero": lambda net, x: net(
        "Add", x, net("Cast", net("ReduceMax", net("NonZero", x), keepdims=0), to=TensorProto.FLOAT)
    ),
    "Softmax": lambda net, x: net("Softmax", x, axis=1),
}


@pytest.mark.parametrize("name", FROZEN)
def test_operators_that_keep_what_they_touch(name: str) -> None:
    net = Net(2, 3, 6, 6)
    x = net.conv("x", 3, 8, name="a")
    anatomy = onnx_anatomy(net.model(net.conv(FROZEN[name](net, x), 8, 3, name="z")))
    assert not any(part.tensor == "a.weight" for group in anatomy.groups for part in group.slices)
    assert any(frozen.name == "a.weight dim 0" and name in frozen.reason for frozen in anatomy.frozen)
    assert (name in anatomy.trace.unknown) == (name in ("LRN", "ScatterElements", "NonZero"))


def test_if_keeps_what_its_branches_read() -> None:
    net = Net(2, 3, 6, 6)
    made = net.conv("x", 3, 8, name="a")
    apart = net.conv("x", 3, 8, name="apart")
    result = helper.make_tensor_value_info("b", TensorProto.FLOAT, [2, 8, 6, 6])
    branches = [helper.make_graph([helper.make_node(k, [made], ["b"])], k, [], [result]) for k in ("Relu", "Tanh")]
    chosen = net("If", net.constant(np.array(True)), then_branch=branches[0], else_branch=branches[1])
    joined = net("Concat", chosen, net.conv(apart, 8, 4, name="b"), axis=1)
    anatomy = holds(net.model(net.conv(joined, 12, 3, name="z")))
    assert {g.name for g in anatomy.of_kind("channel")} == {"apart", "b"}
    assert list(anatomy.trace.unknown) == ["If"] and "If_" in anatomy.trace.unknown["If"][0]


def test_unknown_operators_of_another_domain() -> None:
    net = Net("n", 4)
    made = net.dense("x", 4, 8, name="a")
    net.nodes.append(helper.make_node("Strange", [made], ["strange"], domain="org.example", name="odd"))
    model = net.model(net.dense("strange", 8, 3, name="z"), inferred=False)
    model.opset_import.append(helper.make_opsetid("org.example", 1))
    anatomy = onnx_anatomy(model)
    assert not anatomy.groups
    assert anatomy.trace.unknown["org.example::Strange"] == ["org.example::Strange (odd)"]
    assert any("org.example::Strange (odd) keeps what it touches" in f.reason for f in anatomy.frozen)
