"""An ONNX model laid out for tracing: functions inlined, constants among the initialisers, subgraphs left closed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from secateur.errors import UnsupportedModelError

if TYPE_CHECKING:
    import onnx

Node: TypeAlias = "onnx.NodeProto"
Array = NDArray[Any]
M = TypeVar("M", bound=Any)

OURS = "secateur_"
"""How the names of tensors begin that a cut adds."""


@dataclass(frozen=True)
class Network:
    """A model of which every tensor with given entries is an initialiser. ``title`` is what messages call it."""

    model: onnx.ModelProto
    title: str

    @cached_property
    def initializers(self) -> dict[str, onnx.TensorProto]:
        return {tensor.name: tensor for tensor in self.model.graph.initializer}

    @cached_property
    def opsets(self) -> dict[str, int]:
        """Version of the operators of every domain; that of ONNX is ''."""
        return {_domain(entry.domain): entry.version for entry in self.model.opset_import}

    @property
    def opset(self) -> int:
        return self.opsets.get("", 1)

    @property
    def nodes(self) -> Iterator[Node]:
        yield from self.model.graph.node

    def node(self, number: int) -> Node:
        return self.model.graph.node[number]

    def describe(self, number: int) -> str:
        """``Reshape (/encoder/attn/Reshape)``."""
        return describe(self.node(number))

    @property
    def inputs(self) -> list[onnx.ValueInfoProto]:
        """What the network is fed; old models list their initialisers here too."""
        return [info for info in self.model.graph.input if info.name not in self.initializers]

    def array(self, name: str) -> Array:
        """The entries of an initialiser."""
        from onnx import numpy_helper

        return numpy_helper.to_array(self.initializers[name])


def network(model: onnx.ModelProto, title: str) -> Network:
    """Lay out a model, which is changed. Raises UnsupportedModelError."""
    from onnx import inliner

    if model.functions:
        model = inliner.inline_local_functions(model)
    graph = model.graph
    if graph.sparse_initializer:
        raise UnsupportedModelError(f"{title} holds sparse initialisers; store them dense to cut it")
    nodes = list(graph.node)
    del graph.node[:]
    for node in nodes:
        tensor = _constant(node)
        if tensor is None:
            graph.node.append(node)
        else:
            tensor.name = node.output[0]
            graph.initializer.append(tensor)
    _untie(graph)
    return Network(model, title)


def _untie(graph: onnx.GraphProto) -> None:
    """A vector that several calls read becomes one vector for each.

    Exporters store equal vectors once (all biases of zeros are one), which would couple layers that have nothing to do
    with each other. Larger tensors that are shared stay so: copies would make the model larger.
    """
    vectors = {t.name: t for t in graph.initializer if len(t.dims) == 1 and t.data_type in FLOATING}
    for node in graph.node:
        if node.op_type == "Identity" and node.input[0] in vectors:
            vectors[node.output[0]] = vectors[node.input[0]]
    names = {t.name for t in graph.initializer} | {name for node in graph.node for name in (*node.input, *node.output)}
    seen: set[str] = set()
    for node in graph.node:
        for at, name in enumerate(node.input):
            if name not in vectors or node.op_type == "Identity":
                continue
            original = vectors[name]
            if original.name in seen:
                made = f"{name}_{len(seen)}"
                while made in names:
                    made += "_"
                names.add(made)
                graph.initializer.add().CopyFrom(original)
                graph.initializer[-1].name = node.input[at] = made
            else:
                node.input[at] = original.name
            seen.add(node.input[at])
    read = {name for node in graph.node for name in inputs_of(node)} | {o.name for o in graph.output}
    for at in reversed([i for i, n in enumerate(graph.node) if n.output[0] in vectors and n.output[0] not in read]):
        del graph.node[at]


FLOATING = (1, 10, 11, 16)
"""Entries of float32, float16, float64 and bfloat16."""


def _constant(node: Node) -> onnx.TensorProto | None:
    """What a Constant node gives; None for other nodes, and for one that gives text or a sparse tensor."""
    from onnx import TensorProto, numpy_helper

    if node.op_type != "Constant" or _domain(node.domain):
        return None
    given = attributes(node)
    if "value" in given:
        tensor = TensorProto()
        tensor.CopyFrom(given["value"])
        return tensor
    for name, dtype in (("value_float", np.float32), ("value_floats", np.float32), ("value_int", np.int64)):
        if name in given:
            return numpy_helper.from_array(np.array(given[name], dtype=dtype))
    return numpy_helper.from_array(np.array(given["value_ints"], dtype=np.int64)) if "value_ints" in given else None


def copied(message: M) -> M:
    """A model or a node of its own."""
    made = type(message)()
    made.CopyFrom(message)
    return made


def _domain(name: str) -> str:
    return "" if name == "ai.onnx" else name


def operator(node: Node) -> str:
    """``Conv``, or ``com.microsoft::FusedConv`` of another domain than ONNX's own."""
    domain = _domain(node.domain)
    return f"{domain}::{node.op_type}" if domain else node.op_type


def describe(node: Node) -> str:
    """``Reshape (/encoder/attn/Reshape)``."""
    named = node.name or (node.output[0] if node.output else "")
    return f"{operator(node)} ({named})" if named else operator(node)


def attributes(node: Node) -> dict[str, Any]:
    """The attributes that a node gives, texts as str."""
    from onnx import helper

    found = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in found.items()}


def set_attributes(node: Node, values: Mapping[str, Any]) -> None:
    """Put attributes in place; None takes one away."""
    from onnx import helper

    kept = [a for a in node.attribute if a.name not in values]
    del node.attribute[:]
    node.attribute.extend(kept)
    node.attribute.extend(helper.make_attribute(name, value) for name, value in values.items() if value is not None)


def subgraphs(node: Node) -> list[onnx.GraphProto]:
    """The bodies of If, Loop and Scan."""
    return [g for a in node.attribute for g in ([a.g] if a.HasField("g") else list(a.graphs))]


def inputs_of(node: Node) -> list[str]:
    """Names of the tensors that a node reads, '' for those it goes without; what its bodies read comes last."""
    found = list(node.input)
    for body in subgraphs(node):
        inside = {i.name for i in (*body.input, *body.initializer)}
        for inner in body.node:
            found += [name for name in inputs_of(inner) if name and name not in inside]
            inside |= set(inner.output)
        found += [o.name for o in body.output if o.name not in inside]
    return found
