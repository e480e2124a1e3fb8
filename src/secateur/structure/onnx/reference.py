"""The dense ONNX graph in which everything that leaves is zero: what a cut graph must compute.

Stricter than ``mask_onnx``: activations are zeroed too, and where an average runs over positions that leave it is taken
over those that stay. Needs opset 13 or newer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from secateur.structure.groups import TracedAnatomy
from secateur.structure.kept import Kept
from secateur.structure.onnx.anatomy import onnx_trace
from secateur.structure.onnx.cut import Cutter, Removed, mask_onnx, units_of
from secateur.structure.onnx.network import Array, Node, copied
from secateur.structure.traced import Value

if TYPE_CHECKING:
    import onnx


def reference_onnx(anatomy: TracedAnatomy, removed: Removed) -> onnx.ModelProto:
    """The reference of one cut. Raises UsageError."""
    trace = onnx_trace(anatomy)
    kept = Kept(trace.units, units_of(anatomy, removed))
    cut = {node.output[0]: node for node in Cutter(trace, kept).graph.node}
    made = mask_onnx(anatomy, removed)
    nodes = list(made.graph.node)
    del made.graph.node[:]
    writer = _Writer(made.graph, kept)
    for number, node in enumerate(nodes):
        values = {name: trace.values[name] for name in (*node.input, *node.output) if name in trace.values}
        touched = {name: v for name, v in values.items() if kept.touches(v)}
        if number in trace.averaging and any(name in touched for name in node.input):
            writer.compacted(cut[node.output[0]], touched)
        elif any(name in touched for name in node.output):
            kinds = {name: trace.shapes.element(name) for name in node.output}
            writer.zeroed(node, {n: v for n, v in touched.items() if n in node.output}, kinds)
        else:
            made.graph.node.append(node)
    return made


class _Writer:
    """Adds nodes and constants to a graph."""

    def __init__(self, graph: onnx.GraphProto, kept: Kept) -> None:
        self._graph, self._kept, self._count = graph, kept, 0

    def zeroed(self, node: Node, touched: dict[str, Value], kinds: dict[str, int]) -> None:
        """A node whose outputs become zero where they leave; 0 / 0 becomes zero too."""
        from onnx import TensorProto, helper

        for at, name in enumerate(node.output):
            if name in touched and kinds[name] != TensorProto.BOOL:
                node.output[at] = self._name(name)
        self._graph.node.append(node)
        for made, name in zip(node.output, kinds, strict=True):
            if made != name:
                value = touched[name]
                mask = np.ones([1] * len(value.dims), dtype=bool)
                for d, index in self._axes(value):
                    along = [-1 if i == d else 1 for i in range(len(value.dims))]
                    mask = mask & np.isin(np.arange(len(value.dims[d])), index).reshape(along)
                zero = self._constant(np.zeros((), dtype=helper.tensor_dtype_to_np_dtype(kinds[name])))
                self._add("Where", [self._constant(mask), made, zero], name)

    def compacted(self, node: Node, touched: dict[str, Value]) -> None:
        """A node that works on what stays only, and its results spread among zeros."""
        own = copied(node)
        for at, name in enumerate(node.input):
            for axis, index in self._axes(touched.get(name)):
                own.input[at] = self._add("Gather", [own.input[at], self._constant(index)], axis=axis)
        for at, name in enumerate(node.output):
            if name in touched:
                own.output[at] = self._name(name)
        self._graph.node.append(own)
        for at, name in enumerate(node.output):
            axes = self._axes(touched.get(name))
            here = own.output[at]
            for last, (axis, _) in enumerate(axes, start=1):
                here = self._spread(here, touched[name], axis, name if last == len(axes) else None)

    def _axes(self, value: Value | None) -> list[tuple[int, Array]]:
        """(axis, kept positions) of every dimension of which something leaves."""
        kept = [(d, self._kept.kept(labels)) for d, labels in enumerate(value.dims)] if value is not None else []
        return [(d, stays.nonzero()[0]) for d, stays in kept if not stays.all()]

    def _spread(self, tensor: str, value: Value, axis: int, output: str | None) -> str:
        stays = self._kept.kept(value.dims[axis])
        pads = np.zeros((2, len(value.dims)), dtype=np.int64)
        pads[1, axis] = 1
        padded = self._add("Pad", [tensor, self._constant(pads.reshape(-1))])
        index = np.where(stays, np.cumsum(stays) - 1, stays.sum())
        return self._add("Gather", [padded, self._constant(index)], output, axis=axis)

    def _add(self, kind: str, inputs: list[str], output: str | None = None, axis: int | None = None) -> str:
        from onnx import helper

        output = output or self._name(kind)
        self._graph.node.append(helper.make_node(kind, inputs, [output], axis=axis))
        return output

    def _constant(self, array: Array) -> str:
        from onnx import numpy_helper

        name = self._name("constant")
        self._graph.initializer.append(numpy_helper.from_array(array, name))
        return name

    def _name(self, base: str) -> str:
        self._count += 1
        return f"reference_{base}_{self._count}"
