"""What goes in and what comes out: files, names, bad input."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper

from onnx_models import Net, close, feeds_for, random_cut, run
from secateur.errors import MissingExtraError, ModelLoadError, OutputError, UnsupportedModelError, UsageError
from secateur.structure.groups import traced_anatomy
from secateur.structure.onnx import cut_onnx, load_onnx, mask_onnx, onnx_anatomy, save_onnx, weights
from secateur.structure.trace import trace


def small(dtype: int = onnx.TensorProto.FLOAT) -> onnx.ModelProto:
    net = Net("batch", 3, dtype=dtype)
    made = net.dense(net("Relu", net.dense("x", 3, 8, name="a")), 8, 2, name="b")
    return net.model(made, inferred=False, shape=["batch", 2])


def large() -> onnx.ModelProto:
    """Weights of a few hundred kilobytes."""
    net = Net("batch", 64)
    return net.model(net.dense(net("Relu", net.dense("x", 64, 512, name="a")), 512, 64, name="b"))


def test_there_and_back(tmp_path: Path) -> None:
    save_onnx(large(), tmp_path / "deep" / "dense.onnx")
    anatomy = onnx_anatomy(tmp_path / "deep" / "dense.onnx")
    assert anatomy.model_type == "dense.onnx" and [g.name for g in anatomy.groups] == ["a"]
    removed = {"a": list(range(0, 512, 2))}
    save_onnx(cut_onnx(anatomy, removed), tmp_path / "cut.onnx")
    assert (tmp_path / "cut.onnx").stat().st_size < 0.55 * (tmp_path / "deep" / "dense.onnx").stat().st_size
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut.onnx", "deep"]
    masked = run(mask_onnx(anatomy, removed), feeds_for(anatomy))
    close(run(load_onnx(tmp_path / "cut.onnx"), feeds_for(anatomy)), masked)


def test_weights_beside_the_model(tmp_path: Path) -> None:
    model = large()
    before = model.SerializeToString()
    save_onnx(model, tmp_path / "net.onnx", largest=1000)
    assert [t.raw_data for t in model.graph.initializer] == [
        t.raw_data for t in onnx.ModelProto.FromString(before).graph.initializer
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.onnx", "net.onnx.data"]
    assert (tmp_path / "net.onnx").stat().st_size < 10_000
    anatomy = onnx_anatomy(tmp_path / "net.onnx")
    cut = cut_onnx(anatomy, {"a": [1, 2]})
    with pytest.raises(OutputError, match=r"net\.onnx exists: choose another name, or pass --overwrite"):
        save_onnx(cut, tmp_path / "net.onnx", largest=1000)
    save_onnx(cut, tmp_path / "net.onnx", largest=1000, overwrite=True)
    assert onnx_anatomy(tmp_path / "net.onnx")["a"].units == 510
    (tmp_path / "net.onnx.data").unlink()
    with pytest.raises(ModelLoadError, match=r"net\.onnx keeps weights in another file: .*net\.onnx\.data"):
        onnx_anatomy(tmp_path / "net.onnx")


def test_weights_beside_the_model_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "net.onnx.data").write_text("mine")
    with pytest.raises(OutputError, match=r"net\.onnx\.data exists"):
        save_onnx(large(), tmp_path / "net.onnx", largest=1000)
    save_onnx(large(), tmp_path / "net.onnx")
    assert (tmp_path / "net.onnx.data").read_text() == "mine"


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_, **__) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(onnx, "save", full)
    with pytest.raises(OutputError, match=r"can't write .*net\.onnx: No space left on device"):
        save_onnx(large(), tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "content, message",
    [
        (None, r"model\.onnx is not there"),
        (b"", r"model\.onnx is not an ONNX model: it holds no graph"),
        (b"not a model at all", r"model\.onnx is not an ONNX model"),
        ("folder", r"model\.onnx is not an \.onnx file"),
    ],
)
def test_files_that_are_no_models(tmp_path: Path, content: bytes | str | None, message: str) -> None:
    path = tmp_path / "model.onnx"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        path.mkdir()
    with pytest.raises(ModelLoadError, match=message):
        onnx_anatomy(path)


def test_without_onnx(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingExtraError, match=re.escape("pip install 'secateur[onnx]'")):
        onnx_anatomy(tmp_path / "model.onnx")


def test_importing_this_room_does_not_import_onnx() -> None:
    code = "import secateur.structure.onnx, sys; sys.exit('onnx' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    "removed, message",
    [
        ({"c": [1]}, r"there is no group 'c' in the ONNX model"),
        ({"a": [8]}, r"group 'a' has units 0 to 7, got 8"),
        ({"a": range(8)}, r"group 'a' would lose all of its 8 units: keep at least one"),
    ],
)
def test_units_that_are_not_there(removed, message: str) -> None:
    anatomy = onnx_anatomy(small())
    for function in (cut_onnx, mask_onnx):
        with pytest.raises(UsageError, match=message):
            function(anatomy, removed)


@pytest.mark.parametrize(
    "inputs, message",
    [
        ({"y": (1, 3)}, r"the ONNX model has no input 'y'; its inputs are x"),
        ({"x": (1, 4)}, r"dimension 1 of input 'x' is 3, got 4"),
        ({"x": (1, 3, 1)}, r"input 'x' has 2 dimensions, got the sizes \[1, 3, 1\]"),
        ({"x": (0, 3)}, r"sizes of input 'x' must be positive, got \[0, 3\]"),
    ],
)
def test_sizes_that_do_not_fit(inputs, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        onnx_anatomy(small(), inputs=inputs)


def test_example_sizes_count() -> None:
    assert onnx_anatomy(small(), inputs={"x": (7, 3)}).total.macs == 7 * (3 * 8 + 8 * 2)


def test_what_is_ignored_or_frozen_stays() -> None:
    with pytest.raises(UsageError, match=r"ignore='z\*' matches no parameter of the ONNX model"):
        onnx_anatomy(small(), ignore=["z*"])
    anatomy = onnx_anatomy(small(), ignore=["a.weight"])
    assert not anatomy.groups and any("ignored by 'a.weight'" in f.reason for f in anatomy.frozen)


def test_an_anatomy_of_torch_is_not_one_of_onnx() -> None:
    anatomy = traced_anatomy(trace(torch.nn.Linear(3, 4), (torch.ones(1, 3),)))
    with pytest.raises(UsageError, match="the anatomy of Linear didn't come from an ONNX model: see onnx_anatomy"):
        cut_onnx(anatomy, {})


def test_sparse_initialisers_are_refused() -> None:
    model = small()
    values = helper.make_tensor("s", onnx.TensorProto.FLOAT, [1], [1.0])
    indices = helper.make_tensor("i", onnx.TensorProto.INT64, [1], [0])
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [4]))
    with pytest.raises(UnsupportedModelError, match="holds sparse initialisers; store them dense to cut it"):
        onnx_anatomy(model)


def test_weights_are_what_groups_have_slices_of() -> None:
    anatomy = onnx_anatomy(small())
    found = weights(anatomy)
    assert {name: tuple(w.shape) for name, w in found.items()} == {
        "a.weight": (3, 8),
        "a.bias": (8,),
        "b.weight": (8, 2),
    }
    norms = sum(found[s.tensor].movedim(s.dim, 0)[s.index].flatten(1).square().sum(1) for s in anatomy["a"].slices)
    assert norms.shape == (8,) and (norms > 0).all()


@pytest.mark.parametrize("kind", [onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE])
def test_other_kinds_of_numbers(kind: int) -> None:
    model = small(kind)
    for tensor in model.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor).astype(helper.tensor_dtype_to_np_dtype(kind))
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    model.graph.output[0].type.tensor_type.elem_type = kind
    anatomy = onnx_anatomy(model)
    assert anatomy.total.bytes == anatomy.total.params * (8 if kind == onnx.TensorProto.DOUBLE else 2)
    cut = cut_onnx(anatomy, {"a": [0, 5]})
    onnx.checker.check_model(cut, full_check=True)
    assert weights(anatomy)["a.weight"].shape == (3, 8)
    kept = [n for n in range(8) if n not in (0, 5)]
    for name, at in (("a.weight", (slice(None), kept)), ("b.weight", (kept,))):
        before, after = (
            next(onnx.numpy_helper.to_array(t) for t in m.graph.initializer if t.name == name) for m in (model, cut)
        )
        np.testing.assert_array_equal(after, before[at])


def test_initialisers_that_are_inputs_too() -> None:
    """Models of old list all their initialisers among the inputs."""
    model = small()
    for tensor in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    anatomy = onnx_anatomy(model)
    removed = random_cut(anatomy, 0)
    cut = cut_onnx(anatomy, removed)
    onnx.checker.check_model(cut, full_check=True)
    close(run(cut, feeds_for(anatomy)), run(mask_onnx(anatomy, removed), feeds_for(anatomy)))


def test_functions_are_inlined() -> None:
    """As torch's exporter once wrote modules."""
    net = Net(2, 3)
    hidden, weight = net.dense("x", 3, 8, name="a"), net.weight(8, 2, name="b.weight")
    net.nodes.append(helper.make_node("Read", [hidden, weight], ["y"], domain="local"))
    model = net.model("y", inferred=False)
    nodes = [helper.make_node("Relu", ["i"], ["r"]), helper.make_node("MatMul", ["r", "w"], ["o"])]
    opsets = [helper.make_opsetid("", 18)]
    model.functions.append(helper.make_function("local", "Read", ["i", "w"], ["o"], nodes, opsets))
    model.opset_import.append(helper.make_opsetid("local", 1))
    anatomy = onnx_anatomy(model)
    removed = {"a": [1, 2, 6]}
    close(run(cut_onnx(anatomy, removed), feeds_for(anatomy)), run(mask_onnx(anatomy, removed), feeds_for(anatomy)))


def test_a_shared_matrix_stays_shared() -> None:
    """A tied embedding loses the same columns in both places; equal vectors are parted."""
    from onnx import TensorProto

    net = Net(2, 5, dtype=TensorProto.INT64)
    words = net.weight(9, 8, name="words")
    x = net("Gather", words, "x")
    shared = net.constant(np.zeros(8, dtype=np.float32), name="zeros")
    x = net("Add", net("MatMul", x, net.weight(8, 8, name="a.weight")), shared)
    x = net("Add", net("MatMul", x, net.weight(8, 8, name="b.weight")), shared)
    anatomy = onnx_anatomy(net.model(net("MatMul", x, net("Transpose", words, perm=[1, 0]))))
    assert {g.name: {s.tensor for s in g.slices} for g in anatomy.groups} == {
        "words": {"words", "a.weight", "b.weight", "zeros_1"},
        "a": {"a.weight", "zeros", "b.weight"},
    }
    removed = random_cut(anatomy, 0)
    close(run(cut_onnx(anatomy, removed), feeds_for(anatomy)), run(mask_onnx(anatomy, removed), feeds_for(anatomy)))
