"""Shapes of all tensors of an ONNX graph, node by node, and the entries of those that only depend on shapes.

ONNX infers shapes itself, but needs the entries of computed sizes (Shape → Gather → Concat → Reshape) to go on; so what
small constants give is computed along the way. A dimension without a size gets an example's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from secateur.errors import UsageError
from secateur.structure.onnx.network import Array, Network, attributes, operator, subgraphs

if TYPE_CHECKING:
    import onnx

LIKE_INPUT = {"GroupNormalization", "MeanVarianceNormalization", "SimplifiedLayerNormalization"} | {
    f"com.microsoft::{name}" for name in ("BiasGelu", "FastGelu", "Gelu", "QuickGelu")
}
"""Operators of which ONNX doesn't infer the output, which is of the first input's type."""
LARGEST = 1 << 16
"""Entries beyond which a computed constant isn't computed here."""
RANDOM = {
    "RandomNormal",
    "RandomUniform",
    "RandomNormalLike",
    "RandomUniformLike",
    "Multinomial",
    "Bernoulli",
    "Dropout",
}


class Shapes:
    """Types by the name of the tensor, and ``known`` entries. ``derived`` are those known from a shape."""

    def __init__(self, network: Network, inputs: Mapping[str, Sequence[int]]) -> None:
        from onnx import helper

        self._network = network
        self._declared = {info.name: info.type for info in network.model.graph.value_info}
        self.types: dict[str, onnx.TypeProto] = {}
        self.known: dict[str, Array] = {}
        self.derived: set[str] = set()
        self._symbols: dict[str, int] = {}
        for info in network.inputs:
            self.types[info.name] = info.type
            for dim, size in zip(info.type.tensor_type.shape.dim, inputs[info.name], strict=False):
                if dim.dim_param:
                    self._symbols[dim.dim_param] = size
            if info.type.HasField("tensor_type"):
                kind = info.type.tensor_type.elem_type
                self.types[info.name] = helper.make_tensor_type_proto(kind, list(inputs[info.name]))
        for name, tensor in network.initializers.items():
            self.given(name, tensor)

    def given(self, name: str, tensor: onnx.TensorProto) -> None:
        """An initialiser."""
        from onnx import helper, numpy_helper

        self.types[name] = helper.make_tensor_type_proto(tensor.data_type, list(tensor.dims))
        if np.prod(tensor.dims, dtype=np.int64) <= LARGEST:
            self.known[name] = numpy_helper.to_array(tensor)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a tensor, or None when it isn't known."""
        kind = self.types.get(name)
        if kind is None or not kind.HasField("tensor_type") or not kind.tensor_type.HasField("shape"):
            return None
        dims = kind.tensor_type.shape.dim
        return tuple(d.dim_value for d in dims) if all(d.HasField("dim_value") for d in dims) else None

    def element(self, name: str) -> int:
        """The type of a tensor's entries, 0 when it isn't known."""
        kind = self.types.get(name)
        return kind.tensor_type.elem_type if kind is not None and kind.HasField("tensor_type") else 0

    def add(self, node: onnx.NodeProto) -> str | None:
        """Go on by one node; returns what ONNX says against it, if it does."""
        problem = self._infer(node)
        for name in node.output:
            if name and self.shape(name) is None and operator(node) in LIKE_INPUT and node.input[0] in self.types:
                self.types[name] = self.types[node.input[0]]
            elif name and self.shape(name) is None and name in self._declared:
                self.types[name] = self._sized(self._declared[name])
        self._compute(node)
        return problem

    def _sized(self, declared: onnx.TypeProto) -> onnx.TypeProto:
        """A type that the model states, with the sizes that its inputs' symbols have."""
        import onnx

        found = onnx.TypeProto()
        found.CopyFrom(declared)
        for dim in found.tensor_type.shape.dim if found.HasField("tensor_type") else ():
            if dim.dim_param in self._symbols:
                dim.dim_value = self._symbols[dim.dim_param]
        return found

    def _infer(self, node: onnx.NodeProto) -> str | None:
        from onnx import defs, helper, numpy_helper, shape_inference

        domain = "" if node.domain == "ai.onnx" else node.domain
        names = [name for name in node.input if name]
        if not all(name in self.types for name in names):
            return None
        opsets = [helper.make_opsetid(d, v) for d, v in self._network.opsets.items()]
        small = [name for name in names if name in self.known and self.known[name].size <= 1024]
        entries = {name: numpy_helper.from_array(self.known[name], name) for name in small}
        try:
            schema = defs.get_schema(node.op_type, self._network.opsets.get(domain, 1), domain)
            types = {name: self.types[name] for name in names}
            self.types |= shape_inference.infer_node_outputs(
                schema, node, types, entries, opset_imports=opsets, ir_version=self._network.model.ir_version
            )
        except Exception as error:  # schemas are missing, bodies of loops can't be inferred alone, sizes don't fit
            return str(error)
        return None

    def _compute(self, node: onnx.NodeProto) -> None:
        names = [name for name in node.input if name]
        shape = self.shape(node.input[0]) if node.input else None
        if operator(node) in ("Shape", "Size") and shape is not None:
            given = attributes(node)
            cut = np.array(shape[given.get("start", 0) : given.get("end")], dtype=np.int64)
            found = cut if node.op_type == "Shape" else np.array(np.prod(shape, dtype=np.int64))
            self.known[node.output[0]] = found
            self.derived.add(node.output[0])
            return
        if node.domain not in ("", "ai.onnx") or node.op_type in RANDOM or subgraphs(node) or not names:
            return
        shapes = [self.shape(name) for name in node.output if name]
        if not all(name in self.known for name in names) or any(s and np.prod(s) > LARGEST for s in shapes):
            return
        self._run(node, names)
        if any(name in self.derived for name in names):
            self.derived |= {name for name in node.output if name in self.known}

    def _run(self, node: onnx.NodeProto, names: Sequence[str]) -> None:
        from onnx import helper
        from onnx.reference import ReferenceEvaluator

        try:
            with np.errstate(all="ignore"):
                made = ReferenceEvaluator(node, opsets=self._network.opsets)  # type: ignore[arg-type]
                found = made.run(None, {name: self.known[name] for name in names})
        except Exception:  # onnx's own evaluator lacks an operator: then the entries just aren't known
            return
        for name, entries in zip(node.output, found, strict=False):
            array = np.asarray(entries)
            if name and array.dtype.kind in "biuf" and array.size <= LARGEST:
                self.known[name] = array
                self.types[name] = helper.make_tensor_type_proto(
                    helper.np_dtype_to_tensor_dtype(array.dtype), array.shape
                )


def example_inputs(network: Network, given: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """Sizes of the inputs: as the model or ``given`` says, or such as an example would have. Raises UsageError."""
    names = {info.name for info in network.inputs}
    for name, shape in given.items():
        if name not in names:
            raise UsageError(f"{network.title} has no input {name!r}; its inputs are {', '.join(sorted(names))}")
        if any(n < 1 for n in shape):
            raise UsageError(f"sizes of input {name!r} must be positive, got {list(shape)}")
    symbols: dict[str, int] = {}
    found: dict[str, tuple[int, ...]] = {}
    # what the caller says of one input holds for the same symbol in the others
    for info in sorted(network.inputs, key=lambda i: i.name not in given):
        found[info.name] = _example(network, info, given.get(info.name), symbols)
    return found


def _example(
    network: Network, info: onnx.ValueInfoProto, given: Sequence[int] | None, symbols: dict[str, int]
) -> tuple[int, ...]:
    kind = info.type.tensor_type
    dims = list(kind.shape.dim)
    if given is None and not kind.HasField("shape") and info.type.HasField("tensor_type"):
        raise UsageError(f"{network.title} doesn't say how many dimensions input {info.name!r} has: give its sizes")
    if given is not None and kind.HasField("shape") and len(given) != len(dims):
        raise UsageError(f"input {info.name!r} has {len(dims)} dimensions, got the sizes {list(given)}")
    sizes = []
    for at, dim in enumerate(dims or given or ()):
        fixed = 0 if isinstance(dim, int) else dim.dim_value
        symbol = "" if isinstance(dim, int) else dim.dim_param
        if given is not None and fixed and given[at] != fixed:
            raise UsageError(f"dimension {at} of input {info.name!r} is {fixed}, got {given[at]}")
        usual = 2 if at == 0 else (8 if len(dims) < 4 else 32)
        size = fixed or (given[at] if given is not None else symbols.get(symbol, usual))
        if symbol:
            symbols.setdefault(symbol, size)
        sizes.append(size)
    return tuple(sizes)


def doubled(network: Network, sizes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The same sizes, twice as large where the model leaves them open: what changes with them is dynamic."""
    found = {}
    for info in network.inputs:
        dims = list(info.type.tensor_type.shape.dim)
        open_ = [not d.dim_value for d in dims] or [True] * len(sizes[info.name])
        found[info.name] = tuple(2 * n if o else n for n, o in zip(sizes[info.name], open_, strict=True))
    return found
