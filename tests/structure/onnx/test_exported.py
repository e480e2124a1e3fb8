"""Networks as exporters write them: torch (both ways), Keras, JAX, scikit-learn."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from onnx_models import close, holds, run
from secateur.structure.groups import traced_anatomy
from secateur.structure.onnx import onnx_anatomy
from secateur.structure.trace import trace

EXPORTED = Path(__file__).parent / "exported"


def legacy(module: nn.Module, *args: Tensor, opset: int = 17) -> onnx.ModelProto:
    """With torch's older exporter and a dynamic batch."""
    file, names = io.BytesIO(), [f"x{n}" for n in range(len(args))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        axes = {name: {0: "batch"} for name in names}
        torch.onnx.export(
            module.eval(), args, file, dynamo=False, opset_version=opset, input_names=names, dynamic_axes=axes
        )
    return onnx.load_from_string(file.getvalue())


def dynamo(module: nn.Module, *args: Tensor) -> onnx.ModelProto:
    pytest.importorskip("onnxscript")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.onnx.export(module.eval(), args, dynamo=True, verbose=False).model_proto  # type: ignore[union-attr]


class Block(nn.Module):
    """A small decoder block with grouped queries, written as most are."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 16)
        self.norm = nn.LayerNorm(16)
        self.q, self.kv, self.o = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.up, self.gate, self.down = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        batch, tokens, _ = x.shape
        normed = self.norm(x)
        q = self.q(normed).view(batch, tokens, 4, 4).transpose(1, 2)
        k, v = (t.view(batch, tokens, 2, 4).transpose(1, 2) for t in self.kv(normed).chunk(2, dim=-1))
        k, v = (t.repeat_interleave(2, dim=1) for t in (k, v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).reshape(batch, tokens, 16))
        x = x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return self.head(x)


def convolutional() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Hardswish(),
        nn.Conv2d(8, 12, 1),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(48, 10),
        nn.GELU(),
        nn.Linear(10, 4),
    )


@pytest.mark.parametrize("export", [legacy, dynamo])
def test_torch_and_onnx_say_the_same(export) -> None:
    """Groups, units and costs of a module are those of the model that it is exported to."""
    module, x = convolutional(), torch.randn(2, 3, 8, 8)
    here, there = traced_anatomy(trace(module, (x,))), holds(export(module, x))
    assert [(g.name, g.units, g.cost) for g in there.groups] == [(g.name, g.units, g.cost) for g in here.groups]
    assert there.total == here.total


@pytest.mark.parametrize("export", [legacy, dynamo])
@pytest.mark.parametrize("heads", ["outer", "inner"])
def test_transformer_block_of_torch(export, heads: str) -> None:
    torch.manual_seed(0)
    anatomy = holds(export(Block(), torch.randn(2, 5, 6)), heads=heads)
    assert {g.units for g in anatomy.groups if g.frozen is None} >= {16, 24, {"outer": 2, "inner": 4}[heads]}
    assert not anatomy.trace.unknown


@pytest.mark.parametrize("export", [legacy, dynamo])
def test_attention_layer_of_torch(export) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
    anatomy = holds(export(nn.Sequential(nn.Linear(4, 8), layer, nn.Linear(8, 3)), torch.randn(2, 5, 4)))
    assert {g.name: g.units for g in anatomy.of_kind("channel")} == {"0": 8, "1.self_attn": 2, "1.linear1": 16}


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_of_torch(kind) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = kind(4, 6, num_layers=2, bidirectional=True, batch_first=True)
            self.head = nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0][:, -1])

    torch.manual_seed(0)
    anatomy = holds(legacy(Net(), torch.randn(2, 5, 4)))
    # the exporter slices the first states of all layers out of one tensor of zeros
    assert [g.units for g in anatomy.of_kind("channel")] == [6]


def test_keras() -> None:
    """TensorFlow computes on channels behind; the exporter moves them in front and computes the sizes of a Flatten."""
    model, given = onnx.load(EXPORTED / "keras_net.onnx"), np.load(EXPORTED / "keras_net.npz")
    close(run(model, {"image": given["images"]}), [given["outputs"]])
    anatomy = holds(model, feeds={"image": given["images"]})
    assert {g.name: g.units for g in anatomy.groups} == {"net_1/stem_1": 8, "net_1/point_1": 12, "net_1/hidden_1": 10}
    assert not anatomy.trace.unknown


def test_jax() -> None:
    """Norms come as the sums and roots that they are made of."""
    model, given = onnx.load(EXPORTED / "jax_net.onnx"), np.load(EXPORTED / "jax_net.npz")
    feeds = {model.graph.input[0].name: given["images"]}
    close(run(model, feeds), [given["outputs"]])
    anatomy = holds(model, feeds=feeds)
    assert [(g.units, bool(g.inexact)) for g in anatomy.groups] == [(8, False), (12, True), (20, False)]
    assert not anatomy.trace.unknown


@pytest.mark.parametrize("kind", ["MLPRegressor", "MLPClassifier"])
def test_scikit_learn(kind: str) -> None:
    neural_network = pytest.importorskip("sklearn.neural_network")
    skl2onnx = pytest.importorskip("skl2onnx")
    random = np.random.default_rng(0)
    x, y = random.standard_normal((40, 5)).astype(np.float32), random.integers(0, 3, 40)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitted = getattr(neural_network, kind)(hidden_layer_sizes=(12, 8), max_iter=20, random_state=0).fit(x, y)
        options = {"zipmap": False} if kind == "MLPClassifier" else {}
        model = skl2onnx.to_onnx(fitted, x[:1], options=options and {id(fitted): options})
    anatomy = holds(model, feeds={"X": x})
    assert [g.units for g in anatomy.groups] == [12, 8]
    assert onnx_anatomy(model).total.params == sum(w.size for w in (*fitted.coefs_, *fitted.intercepts_))
