"""The cut ONNX model, and the masked one that it must equal.

The shape of every tensor in the cut graph is inferred once more and must be the one that the labels foresee. Sizes
that the graph computes from shapes compute themselves anew; where that gives another number than is due (or where a
number from a shape is no size, such as the scale of attention scores), the number due is written in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from secateur.errors import UnsupportedModelError, UsageError
from secateur.structure.groups import TracedAnatomy
from secateur.structure.kept import Kept
from secateur.structure.onnx.anatomy import onnx_trace
from secateur.structure.onnx.network import (
    OURS,
    Array,
    Network,
    Node,
    attributes,
    copied,
    inputs_of,
    operator,
    set_attributes,
)
from secateur.structure.onnx.resize import RESIZERS, Instead
from secateur.structure.onnx.shapes import Shapes
from secateur.structure.onnx.trace import OnnxTrace
from secateur.structure.traced import Call, Value

if TYPE_CHECKING:
    import onnx

Removed = Mapping[str, "torch.Tensor | Sequence[int]"]


def cut_onnx(anatomy: TracedAnatomy, removed: Removed) -> onnx.ModelProto:
    """The model without the units of ``removed`` (unit numbers by group); inputs and outputs stay as they are.

    Raises UsageError for units that aren't there, UnsupportedModelError when a call can't be written for the new sizes.
    """
    trace = onnx_trace(anatomy)
    return Cutter(trace, Kept(trace.units, units_of(anatomy, removed))).model


def mask_onnx(anatomy: TracedAnatomy, removed: Removed) -> onnx.ModelProto:
    """The dense model with zeros wherever an initialiser belongs to a unit of ``removed``.

    It computes what the cut one does, except where a group is marked as inexact. Raises UsageError.
    """
    trace = onnx_trace(anatomy)
    kept = Kept(trace.units, units_of(anatomy, removed))
    model = copied(trace.network.model)
    for tensor in model.graph.initializer:
        value = trace.values.get(tensor.name)
        if value is not None and tensor.name in trace.element_sizes() and kept.touches(value):
            zeroed = trace.network.array(tensor.name).copy()
            for dim, labels in enumerate(value.dims):
                zeroed[(slice(None),) * dim + (~kept.kept(labels),)] = 0
            _put(tensor, zeroed)
    return model


def units_of(anatomy: TracedAnatomy, removed: Removed) -> set[int]:
    """Representatives of the units that leave. Raises UsageError."""
    for name, units in removed.items():
        if name not in anatomy:
            raise UsageError(f"there is no group {name!r} in {anatomy.model_type}")
        group = anatomy[name]
        if group.frozen is not None and len(units):
            raise UsageError(f"group {name!r} stays: {group.frozen}")
        outside = [int(u) for u in units if not 0 <= int(u) < group.units]
        if outside:
            raise UsageError(f"group {name!r} has units 0 to {group.units - 1}, got {outside[0]}")
        if len({int(u) for u in units}) == group.units:
            raise UsageError(f"group {name!r} would lose all of its {group.units} units: keep at least one")
    return anatomy.units_removed({name: torch.as_tensor(units, dtype=torch.int64) for name, units in removed.items()})


class Cutter:
    """Writes the cut graph node by node, and is the ``Edit`` of the node at hand."""

    def __init__(self, trace: OnnxTrace, kept: Kept) -> None:
        self.trace, self.kept = trace, kept
        self.model = _without_graph(trace.network.model)
        self.graph = self.model.graph
        for name, value in trace.parameters.items():
            if 0 in kept.shape(value) and 0 not in value.shape:
                raise UsageError(f"these units together are all there is along one dimension of {name}: keep some")
        self._names = {n for node in trace.network.nodes for n in (*node.input, *node.output)} | set(trace.values)
        sizes = {i.name: self._size_of_input(i.name) for i in trace.network.inputs}
        self._cut_initializers()
        self._state_shapes()
        self.shapes = Shapes(Network(self.model, trace.title), sizes)
        for number in range(len(trace.network.model.graph.node)):
            self._write(number)
        self._drop_unused()

    def _size_of_input(self, name: str) -> tuple[int, ...]:
        value = self.trace.values.get(name)
        return tuple(self.kept.shape(value)) if value is not None else self.trace.shapes.shape(name) or ()

    # -- the graph -----------------------------------------------------------------------------------------------

    def _cut_initializers(self) -> None:
        for old in self.trace.network.model.graph.initializer:
            value, tensor = self.trace.values.get(old.name), self.graph.initializer.add(name=old.name)
            if value is not None and self.kept.touches(value):
                _put(tensor, self.compact(self.trace.network.array(old.name), value))
            else:
                tensor.CopyFrom(old)

    def compact(self, array: Array, value: Value) -> Array:
        """An array without what leaves."""
        for dim, labels in enumerate(value.dims):
            kept = self.kept.kept(labels)
            if not kept.all():
                array = np.compress(kept, array, axis=dim)
        return array

    def _write(self, number: int) -> None:
        old = self.trace.network.node(number)
        self.node = copied(old)
        values = [self.trace.values.get(name) if name else None for name in old.input]
        self.outputs = [v for name in old.output if (v := self.trace.values.get(name)) is not None]
        call = Call(number, operator(old), {"inputs": values, **attributes(old)}, (), self.trace.network.describe)
        self.call = call
        touched = any(self.kept.touches(v) for v in (*values, *self.outputs) if v is not None)
        self._replaced: set[int] = set()
        try:
            if touched and call.name in RESIZERS:
                RESIZERS[call.name](self)
        except Instead:
            self._bypass()
            return
        self._hold_numbers(old, values)
        self._append(self.node)

    def _append(self, node: Node) -> None:
        self.graph.node.append(node)
        problem = self.shapes.add(node)
        for name in node.output:
            value, shape = self.trace.values.get(name), self.shapes.shape(name)
            if value is not None and (shape is None or list(shape) != self.kept.shape(value)):
                found = problem or f"it gives {shape and list(shape)}"
                raise UnsupportedModelError(
                    f"can't cut through {self.call.where}: {found} where {self.kept.shape(value)} is due"
                )

    def _hold_numbers(self, old: Node, values: Sequence[Value | None]) -> None:
        """What a shape gives beyond sizes of tensors must be what it was."""
        dense = self.trace.shapes
        if all(name in dense.derived for name in old.output if name):
            return
        for at, (name, value) in enumerate(zip(old.input, values, strict=True)):
            if name in dense.derived and name in dense.known and value is not None and at not in self._replaced:
                self.want(at, self.compact(dense.known[name], value))

    def _state_shapes(self) -> None:
        for info in (*self.graph.value_info, *self.graph.input):
            value = self.trace.values.get(info.name)
            if value is None:
                continue
            for dim, labels in zip(info.type.tensor_type.shape.dim, value.dims, strict=False):
                if not self.kept.kept(labels).all():
                    dim.dim_value = self.kept.size(labels)

    def _drop_unused(self) -> None:
        """Settings that were replaced go, unless they were there for nobody before."""
        used = {n for node in self.graph.node for n in inputs_of(node)} | {o.name for o in self.graph.output}
        before = {n for node in self.trace.network.nodes for n in inputs_of(node)}
        stays = [t for t in self.graph.initializer if t.name in used or t.name not in before]
        if len(stays) < len(self.graph.initializer):
            gone = {t.name for t in self.graph.initializer} - {t.name for t in stays}
            for kind in (self.graph.initializer, self.graph.input):
                for at in reversed([i for i, one in enumerate(kind) if one.name in gone]):
                    del kind[at]

    # -- the words of Edit ---------------------------------------------------------------------------------------

    def want(self, at: int, entries: Array) -> None:
        """An input must hold these entries; those that change with dynamic sizes stay as they are computed."""
        self._replaced.add(at)
        old = self.node.input[at] if at < len(self.node.input) else ""
        here = self.shapes.known.get(old)
        if here is not None and here.shape == entries.shape and np.array_equal(here, entries):
            return
        made = entries if here is None else entries.astype(here.dtype)
        static = self.trace.static(old) if old else None
        if static is None or here is None or static.shape != entries.shape or static.all():
            name = self._constant(made)
        else:
            name = self._called("Where", self._constant(static), self._constant(made), self._scaled(old, made, static))
        while len(self.node.input) <= at:
            self.node.input.append("")
        self.node.input[at] = name

    def _scaled(self, old: str, entries: Array, static: Array) -> str:
        """Computed sizes, times the part that stays of dimensions that are merged with dynamic ones."""
        here = self.shapes.known[old]
        if (static | (here == entries)).all() or here.dtype.kind != "i" or (here <= 0).any():
            return old
        common = np.where(static, here, np.gcd(here, entries))
        times, parts = np.where(static, 1, entries // common), np.where(static, 1, here // common)
        grown = self._called("Mul", old, self._constant(times.astype(here.dtype)))
        return self._called("Div", grown, self._constant(parts.astype(here.dtype)))

    def set(self, values: Mapping[str, Any]) -> None:
        """Give attributes these values; None takes one away."""
        set_attributes(self.node, values)

    def take(self, axis: int, index: Array) -> None:
        """Look positions of the first input up before the call."""
        self.node.input[0] = self._called("Gather", self.node.input[0], self._constant(index), axis=axis)

    def _called(self, kind: str, *inputs: str, **given: int) -> str:
        """The output of a call more."""
        from onnx import helper

        name = self._fresh(kind.lower())
        node = helper.make_node(kind, inputs, [name], name=name)
        set_attributes(node, given)
        self.graph.node.append(node)
        self.shapes.add(node)
        return name

    def _bypass(self) -> None:
        from onnx import helper

        self._append(helper.make_node("Identity", [self.node.input[0]], list(self.node.output), name=self.node.name))

    def _constant(self, entries: Array) -> str:
        from onnx import numpy_helper

        tensor = numpy_helper.from_array(entries, self._fresh("cut"))
        self.graph.initializer.append(tensor)
        self.shapes.given(tensor.name, tensor)
        return tensor.name

    def _fresh(self, base: str) -> str:
        number = 0
        while (name := f"{OURS}{base}_{number}") in self._names:
            number += 1
        self._names.add(name)
        return name


def _without_graph(model: onnx.ModelProto) -> onnx.ModelProto:
    """A model with the same head, inputs and outputs, and no nodes or weights yet: those may be many gigabytes."""
    import onnx

    made = onnx.ModelProto()
    for field, value in model.ListFields():
        if field.name != "graph":
            _give(made, field.name, value)
    for field, value in model.graph.ListFields():
        if field.name not in ("node", "initializer"):
            _give(made.graph, field.name, value)
    return made


def _give(message: Any, name: str, value: Any) -> None:
    if hasattr(value, "extend"):
        getattr(message, name).extend(value)
    elif hasattr(value, "CopyFrom"):
        getattr(message, name).CopyFrom(value)
    else:
        setattr(message, name, value)


def _put(tensor: onnx.TensorProto, array: Array) -> None:
    """Other entries for an initialiser, which keeps its name."""
    from onnx import numpy_helper

    name = tensor.name
    tensor.CopyFrom(numpy_helper.from_array(array, name))
