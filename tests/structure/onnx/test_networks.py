"""Whole networks of every kind: cut and masked agree in onnxruntime."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_models import Net, holds


def groups(anatomy) -> dict[str, int]:
    return {g.name: g.units for g in anatomy.groups if g.frozen is None}


def test_residual_network() -> None:
    net = Net("batch", 3, 8, 8)
    stem = net("Relu", net.conv("x", 3, 8, name="stem"))
    inner = net("Relu", net.conv(stem, 8, 6, name="inner"))
    joined = net("Add", stem, net.conv(inner, 6, 8, name="outer"))
    pooled = net("Flatten", net("GlobalAveragePool", joined))
    anatomy = holds(net.model(net("Gemm", pooled, net.weight(5, 8), net.weight(5), transB=1)))
    assert groups(anatomy) == {"stem": 8, "inner": 6}
    assert {(s.tensor, s.dim) for s in anatomy["inner"].slices} == {
        ("inner.weight", 0),
        ("inner.bias", 0),
        ("outer.weight", 1),
    }


def test_batch_norm_and_depthwise() -> None:
    net = Net(2, 3, 8, 8)
    x = net.conv("x", 3, 8, name="a")
    x = net("BatchNormalization", x, net.weight(8), net.weight(8), net.weight(8), net.weight(8, positive=True))
    x = net("Clip", x, net.constant(np.float32(0)), net.constant(np.float32(6)))
    x = net.conv(x, 8, 8, name="depth", group=8)
    x = net.conv(net("HardSwish", x), 8, 4, kernel=1, name="point")
    anatomy = holds(net.model(net("ReduceMean", x, net.ints(2, 3), keepdims=0)))
    assert groups(anatomy) == {"a": 8}


def test_grouped_convolution() -> None:
    net = Net(2, 3, 8, 8)
    x = net.conv("x", 3, 12, name="a")
    x = net.conv(net("Relu", x), 12, 8, name="b", group=4)
    anatomy = holds(net.model(net.conv(x, 8, 3, kernel=1, name="c")))
    assert set(groups(anatomy).values()) == {4, 3, 2}


def test_dense_concatenation() -> None:
    net = Net(1, 3, 8, 8)
    features = [net.conv("x", 3, 4, name="stem")]
    for number in range(3):
        seen = net("Concat", *features, axis=1) if number else features[0]
        features.append(net("Relu", net.conv(seen, 4 + 4 * number, 4, name=f"layer{number}")))
    joined = net("Concat", *features, axis=1)
    anatomy = holds(net.model(net.conv(net("MaxPool", joined, kernel_shape=[2, 2]), 16, 2, name="head")))
    assert groups(anatomy) == {"stem": 4, "layer0": 4, "layer1": 4, "layer2": 4}


def test_channel_shuffle() -> None:
    net = Net("n", 3, 8, 8)
    x = net.conv("x", 3, 8, name="a")
    x = net("Reshape", x, net.ints(0, 2, 4, 8, 8))
    x = net("Reshape", net("Transpose", x, perm=[0, 2, 1, 3, 4]), net.ints(-1, 8, 8, 8))
    first, second = net("Split", x, axis=1, outputs=2, num_outputs=2)
    x = net("Concat", net.conv(first, 4, 4, name="b"), second, axis=1)
    holds(net.model(net.conv(x, 8, 3, name="c")))


def test_squeeze_and_excitation() -> None:
    net = Net(2, 3, 8, 8)
    x = net.conv("x", 3, 8, name="a")
    squeezed = net("Relu", net.conv(net("GlobalAveragePool", x), 8, 4, kernel=1, name="squeeze"))
    gate = net("Sigmoid", net.conv(squeezed, 4, 8, kernel=1, name="excite"))
    anatomy = holds(net.model(net.conv(net("Mul", x, gate), 8, 3, name="b")))
    assert groups(anatomy) == {"a": 8, "squeeze": 4}


def test_u_net_with_transposed_convolution() -> None:
    net = Net(1, 3, 8, 8)
    first = net("Relu", net.conv("x", 3, 6, name="down"))
    low = net("Relu", net.conv(first, 6, 8, name="low", strides=[2, 2]))
    up = net("ConvTranspose", low, net.weight(8, 6, 2, 2, name="up.weight"), strides=[2, 2])
    sizes = net("Resize", low, "", "", net.ints(1, 8, 8, 8), mode="nearest")
    joined = net("Concat", first, up, sizes, axis=1)
    anatomy = holds(net.model(net.conv(joined, 20, 3, name="out")))
    assert groups(anatomy) == {"down": 6, "low": 8, "up": 6}


def test_pixel_shuffles() -> None:
    for mode in ("DCR", "CRD"):
        net = Net(1, 3, 4, 4)
        x = net("DepthToSpace", net.conv("x", 3, 16, name="a"), blocksize=2, mode=mode)
        x = net("SpaceToDepth", net.conv(x, 4, 4, name="b"), blocksize=2)
        anatomy = holds(net.model(net.conv(x, 16, 2, name="c")))
        assert groups(anatomy) == {"a": 4, "b": 4}


@pytest.mark.parametrize("heads", ["outer", "inner", "both"])
def test_attention_with_computed_shapes(heads: str) -> None:
    """Sizes come from Shape, as exporters write them, and so does the scale of the scores."""
    net = Net("batch", "tokens", 12)
    shape = net("Shape", "x")
    batch, tokens = (net("Gather", shape, net.ints(n), axis=0) for n in (0, 1))
    split = net("Concat", batch, tokens, net.ints(3), net.ints(4), axis=0)
    q, k, v = (
        net("Transpose", net("Reshape", net.dense("x", 12, 12, name=n), split), perm=[0, 2, 1, 3]) for n in "qkv"
    )
    lanes = net("Gather", net("Shape", q), net.constant(np.int64(3)), axis=0)
    scale = net("Sqrt", net("Cast", lanes, to=1))
    scores = net("Div", net("MatMul", q, net("Transpose", k, perm=[0, 1, 3, 2])), scale)
    mixed = net("Transpose", net("MatMul", net("Softmax", scores, axis=-1), v), perm=[0, 2, 1, 3])
    # of a tensor that can be cut apart from the one that is reshaped
    width = net("Gather", net("Shape", net.dense("x", 12, 12, name="other")), net.ints(2), axis=0)
    x = net("Reshape", mixed, net("Concat", batch, tokens, width, axis=0))
    anatomy = holds(net.model(net.dense(x, 12, 12, name="o")), heads=heads)
    assert set(groups(anatomy).values()) == {"outer": {3, 12}, "inner": {4, 12}, "both": {3, 4, 12}}[heads]


def test_transformer_block_with_layer_norm() -> None:
    net = Net("batch", 5, 8)
    x = net.dense("x", 8, 8, name="embed")
    normed = net("LayerNormalization", x, net.weight(8), net.weight(8))
    hidden = net("Gelu", net.dense(normed, 8, 16, name="up")) if net.opset >= 20 else net.dense(normed, 8, 16, "up")
    x = net("Add", x, net.dense(net("Tanh", hidden), 16, 8, name="down"))
    anatomy = holds(net.model(net.dense(x, 8, 3, name="head")))
    assert anatomy["embed"].inexact and anatomy["up"].inexact is None


@pytest.mark.parametrize("kind, gates", [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
@pytest.mark.parametrize("directions", [1, 2])
def test_recurrent_layers(kind: str, gates: int, directions: int) -> None:
    net = Net(5, "batch", 3)
    x = net.dense("x", 3, 4, name="embed")
    direction = "bidirectional" if directions == 2 else "forward"
    for number, inputs in enumerate((4, 6 * directions)):
        weights = [(directions, gates * 6, inputs), (directions, gates * 6, 6), (directions, 2 * gates * 6)]
        given = [net.weight(*s, name=f"{n}{number}") for s, n in zip(weights, "wrb", strict=True)]
        made = net(kind, x, *given, outputs=2, hidden_size=6, direction=direction)
        x = net("Reshape", net("Transpose", made[0], perm=[0, 2, 1, 3]), net.ints(0, 0, -1))
    last = net("Slice", x, net.ints(4), net.ints(5), net.ints(0))
    anatomy = holds(net.model(net.dense(net("Squeeze", last, net.ints(0)), 6 * directions, 2, name="head")))
    assert groups(anatomy) == {"embed": 4, "w0": 6, "w1": 6}


@pytest.mark.parametrize("kind, gates", [("LSTM", 4), ("GRU", 3)])
def test_initial_states_keep_their_directions_and_batch(kind: str, gates: int) -> None:
    net = Net(5, 3, 4)
    weights = [net.weight(*s, name=n) for s, n in (((2, gates * 6, 4), "w"), ((2, gates * 6, 6), "r"))]
    made = net(
        kind, "x", *weights, "", "", net.weight(2, 3, 6, name="h0"), outputs=2, hidden_size=6, direction="bidirectional"
    )
    x = net("Reshape", net("Transpose", made[0], perm=[0, 2, 1, 3]), net.ints(0, 0, -1))
    anatomy = holds(net.model(net.dense(x, 12, 2, name="head")))
    assert groups(anatomy) == {"w": 6}


def test_embedding_and_einsum() -> None:
    from onnx import TensorProto

    net = Net("batch", 5, dtype=TensorProto.INT64)
    x = net("Gather", net.weight(7, 8, name="words"), "x", axis=0)
    x = net("Add", x, net.weight(1, 5, 8, name="places"))
    x = net("Einsum", x, net.weight(8, 2, 3, name="mix"), equation="btd,dhe->bhte")
    x = net("Einsum", net("Tanh", x), net.weight(2, 3, 4, name="out"), equation="bhte,hec->btc")
    anatomy = holds(net.model(x), heads="both")
    assert groups(anatomy)["words"] == 8
