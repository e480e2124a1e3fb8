"""One call of an ONNX graph as a model of its own, whole or without some units."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from secateur.errors import UnsupportedModelError
from secateur.structure.kept import Kept
from secateur.structure.onnx.cut import Cutter
from secateur.structure.onnx.network import Network, describe
from secateur.structure.onnx.shapes import Shapes
from secateur.structure.onnx.trace import OnnxTrace

if TYPE_CHECKING:
    import onnx


def single_call(trace: OnnxTrace, number: int, removed: Iterable[int]) -> onnx.ModelProto:
    """The call with this number in the graph, in which weights and settings are constants and all else is fed.

    Raises UnsupportedModelError when it can't be written for the new sizes.
    """
    alone = _alone(trace, number)
    return Cutter(alone, Kept(trace.units, removed)).model


def _alone(trace: OnnxTrace, number: int) -> OnnxTrace:
    """The trace of the call, with labels of the whole one."""
    from onnx import helper, numpy_helper

    whole, node = trace.network, trace.network.node(number)
    graph = helper.make_graph([node], "call", [], [])
    for name in dict.fromkeys(name for name in node.input if name):
        if name in whole.initializers:
            graph.initializer.add().CopyFrom(whole.initializers[name])
        elif name in trace.shapes.known:
            graph.initializer.append(numpy_helper.from_array(trace.shapes.known[name], name))
        else:
            shape, kind = trace.shapes.shape(name), trace.shapes.element(name)
            if shape is None or not kind:
                raise UnsupportedModelError(f"can't run {describe(node)} alone: the shape of {name} isn't known")
            graph.input.append(helper.make_tensor_value_info(name, kind, shape))
    for name in node.output:
        if name:
            graph.output.append(helper.make_tensor_value_info(name, trace.shapes.element(name), None))
    model = helper.make_model(graph, opset_imports=whole.model.opset_import, ir_version=whole.model.ir_version)
    alone = Network(model, trace.title)
    shapes = Shapes(alone, {info.name: trace.shapes.shape(info.name) or () for info in graph.input})
    shapes.add(node)
    names = [name for name in (*node.input, *node.output) if name in trace.values]
    return OnnxTrace(
        units=trace.units,
        parameters={name: trace.values[name] for name in names if name in alone.initializers},
        values={name: trace.values[name] for name in names},
        network=alone,
        shapes=shapes,
        larger=shapes,
    )
