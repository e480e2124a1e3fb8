"""Small ONNX models, built call by call, and what every cut of one must hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from secateur.structure.groups import TracedAnatomy
from secateur.structure.onnx import cut_onnx, mask_onnx, onnx_anatomy
from secateur.structure.onnx.reference import reference_onnx


class Net:
    """Adds one call after the other; ``x`` is the input."""

    def __init__(self, *shape: int | str, opset: int = 18, dtype: int = TensorProto.FLOAT) -> None:
        self.random = np.random.default_rng(0)
        self.opset, self._count = opset, 0
        self.inputs = [helper.make_tensor_value_info("x", dtype, shape)]
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def input(self, name: str, *shape: int | str, dtype: int = TensorProto.FLOAT) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def weight(self, *shape: int, name: str = "", positive: bool = False) -> str:
        array = self.random.standard_normal(shape) * 0.5
        return self.constant((np.abs(array) + 0.5 if positive else array).astype(np.float32), name)

    def ints(self, *values: int) -> str:
        return self.constant(np.array(values, dtype=np.int64))

    def constant(self, array: Any, name: str = "") -> str:
        self._count += 1
        self.initializers.append(numpy_helper.from_array(np.asarray(array), name or f"w{self._count}"))
        return self.initializers[-1].name

    def __call__(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        self._count += 1
        names = [f"{kind.lower()}_{self._count}" + (f"_{i}" if i else "") for i in range(outputs)]
        name = f"{kind}_{self._count}"
        self.nodes.append(helper.make_node(kind, list(inputs), names, name=name, **attributes))
        return names[0] if outputs == 1 else names

    def conv(self, x: str, inputs: int, outputs: int, kernel: int = 3, name: str = "", **attributes: Any) -> str:
        weight = self.weight(
            outputs, inputs // attributes.get("group", 1), kernel, kernel, name=name and f"{name}.weight"
        )
        bias = self.weight(outputs, name=name and f"{name}.bias")
        return self("Conv", x, weight, bias, pads=[kernel // 2] * 4, **attributes)

    def dense(self, x: str, inputs: int, outputs: int, name: str = "") -> str:
        product = self("MatMul", x, self.weight(inputs, outputs, name=name and f"{name}.weight"))
        return self("Add", product, self.weight(outputs, name=name and f"{name}.bias"))

    def model(self, *outputs: str, inferred: bool = True, shape: list[int | str] | None = None) -> onnx.ModelProto:
        infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in outputs]
        graph = helper.make_graph(self.nodes, "net", self.inputs, infos, self.initializers)
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=10)
        return onnx.shape_inference.infer_shapes(made) if inferred else made


def run(model: onnx.ModelProto, feeds: dict[str, Any]) -> list[Any]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def feeds_for(anatomy: TracedAnatomy, seed: int = 0) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    shapes, found = anatomy.trace.shapes, {}
    for info in anatomy.trace.network.inputs:
        dtype = helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type)
        shape = shapes.shape(info.name)
        values = random.standard_normal(shape) if dtype.kind == "f" else random.integers(0, 5, shape)
        found[info.name] = values.astype(dtype)
    return found


def random_cut(anatomy: TracedAnatomy, seed: int, among: Any = None) -> dict[str, list[int]]:
    """Some units of every group that may be cut, but never all."""
    random = np.random.default_rng(seed)
    groups = [g for g in anatomy.groups if g.frozen is None and g.units > 1 and (among is None or g.name in among)]
    return {
        g.name: sorted(
            random.choice(g.units, int(random.integers(1, max(2, g.units // 2 + 1))), replace=False).tolist()
        )
        for g in groups
    }


def close(found: list[Any], expected: list[Any], tolerance: float = 1e-4) -> None:
    for one, other in zip(found, expected, strict=True):
        scale = max(1.0, float(np.abs(np.asarray(other, dtype=np.float64)).max(initial=0)))
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * scale)


def holds(
    model: onnx.ModelProto, cuts: int = 3, feeds: dict[str, Any] | None = None, masked: bool = True, **options: Any
) -> TracedAnatomy:
    """Random cuts are valid, smaller by what was foretold, and equal to the masked model; the model isn't touched."""
    before = model.SerializeToString()
    anatomy = onnx_anatomy(model, **options)
    feeds = feeds or feeds_for(anatomy)
    assert random_cut(anatomy, 0), f"nothing can be cut: {anatomy.frozen}"
    for seed in range(cuts):
        removed = random_cut(anatomy, seed)
        cut = cut_onnx(anatomy, removed)
        onnx.checker.check_model(cut, full_check=True)
        found = run(cut, feeds)
        close(found, run(reference_onnx(anatomy, removed), feeds))
        if masked and not any(anatomy[name].inexact for name in removed):
            close(found, run(mask_onnx(anatomy, removed), feeds))
        foretold = anatomy.costs.without(anatomy.units_removed(removed))
        total = onnx_anatomy(cut, **options).total
        assert foretold.params < anatomy.total.params and foretold.bytes < anatomy.total.bytes
        assert total == foretold, (total, foretold)
    assert model.SerializeToString() == before
    return anatomy
