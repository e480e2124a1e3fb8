"""Tracing an ONNX graph: the rule of every operator says which positions leave together, as in torch graphs.

An operator without a rule, and If, Loop and Scan, keep everything that they touch and are listed by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import cycle
from typing import Any

import numpy as np

from secateur.errors import UsageError
from secateur.structure.onnx.network import (
    FLOATING,
    OURS,
    Array,
    Network,
    Node,
    attributes,
    inputs_of,
    operator,
    subgraphs,
)
from secateur.structure.onnx.shapes import RANDOM, Shapes, doubled, example_inputs
from secateur.structure.traced import SAMPLES, Call, NoRule, Rule, Step, Traced, Value, Zeros
from secateur.structure.units import Labels

Function = Callable[["OnnxTrace", Call], "Value | Sequence[Value]"]


@dataclass(frozen=True)
class OnnxRule(Rule):
    """``settings`` are the numbers of the inputs that hold sizes, axes or bounds instead of data."""

    settings: tuple[int, ...] = ()


RULES: dict[str, OnnxRule] = {}
"""Operator → its rule."""


def rule(*operators: str, settings: Sequence[int] = (), zeros: Zeros = Zeros.LOST) -> Callable[[Function], Function]:
    """Register the rule of an ONNX operator.

    ``call["inputs"]`` are its values, None for one that isn't given; ``call.node`` is the node's number.
    """

    def register(function: Function) -> Function:
        for name in operators:
            if name in RULES:
                raise UsageError(f"operator {name} has a rule already")
            RULES[name] = OnnxRule(function, zeros, tuple(settings))
        return function

    return register


@dataclass
class OnnxTrace(Traced):
    """A traced ONNX graph. ``values`` are those of the tensors whose shapes are known, by name."""

    network: Network
    shapes: Shapes
    larger: Shapes
    """The same with larger dynamic sizes."""
    values: dict[str, Value] = field(default_factory=dict)
    _made: set[int] = field(default_factory=set)
    _users: dict[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return self.network.title

    def element_sizes(self) -> dict[str, int]:
        """Initialisers of floating point count as parameters, statistics of norms among them.

        Scalars don't, and neither does what an earlier cut wrote in.
        """
        from onnx import helper

        found = {}
        for name in self.parameters:
            tensor = self.network.initializers[name]
            if tensor.data_type in FLOATING and tensor.dims and not name.startswith(OURS):
                found[name] = helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        return found

    def static(self, name: str) -> Array | None:
        """[entries] bool of a tensor with known entries: False changes with dynamic sizes. None when not known."""
        here, there = self.shapes.known.get(name), self.larger.known.get(name)
        if here is None:
            return None
        if there is None or here.shape != there.shape:
            return np.zeros(here.shape, dtype=bool)
        return here == there

    def constant(self, call: Call, at: int) -> Array | None:
        """The entries of an input when they are the same whatever the network is fed, or None."""
        inputs = self.network.node(call.node).input
        name = inputs[at] if at < len(inputs) else ""
        static = self.static(name) if name else None
        return self.shapes.known[name] if static is not None and static.all() else None

    def steps(self) -> list[Step]:
        found: list[Step] = []
        number: dict[str, int] = {}
        for node in self.network.nodes:
            inputs = [name for name in inputs_of(node) if name]
            step = Step(
                operator=node.op_type,
                where=_module(node),
                sources=tuple(dict.fromkeys(number[name] for name in inputs if name in number)),
                parameters={name: self.values[name] for name in inputs if name in self.parameters},
                outputs=tuple(self.values[name] for name in node.output if name in self.values),
            )
            number |= dict.fromkeys(node.output, len(found))
            found.append(step)
        return found

    def unmasked(self) -> Collection[str]:
        """Numbers that aren't of floating point, and what an earlier cut wrote in."""
        return self.parameters.keys() - self.element_sizes().keys()

    def zeros(self, call: Call) -> Zeros:
        return RULES[call.name].zeros

    def sampled(self, call: Call, zero: Collection[int]) -> Array | None:
        from onnx import helper
        from onnx.reference import ReferenceEvaluator

        node = self.network.node(call.node)
        if node.op_type in RANDOM - {"Dropout"}:
            return None
        operands, feeds = cycle(zip(*SAMPLES, strict=True)), {}
        try:
            for name in dict.fromkeys(filter(None, node.input)):
                known = self.shapes.known.get(name)
                dtype = helper.tensor_dtype_to_np_dtype(self.shapes.element(name))
                if id(self.values[name]) in zero:
                    feeds[name] = np.zeros(len(SAMPLES), dtype)
                elif known is not None and known.size == 1:
                    feeds[name] = known.reshape([1] * min(known.ndim, 1))
                else:
                    numbers = np.array(next(operands))
                    feeds[name] = (numbers if dtype.kind == "f" else numbers > 0).astype(dtype)
            with np.errstate(all="ignore"):
                made = ReferenceEvaluator(node, opsets=self.network.opsets).run(None, feeds)  # type: ignore[arg-type]
            return np.concatenate([np.asarray(array, dtype=np.float64).reshape(-1) for array in made])
        except Exception:  # onnx's own evaluator lacks an operator
            return None

    def pads_with_zeros(self, call: Call) -> bool:
        filler = self.constant(call, 2) if len(call["inputs"]) > 2 and call["inputs"][2] is not None else None
        given = call["inputs"][2:3] not in ([], [None])
        return not call.get("value") and (not filler.any() if filler is not None else not given)

    def makes(self, labels: Labels) -> None:
        """Along this dimension of a weight lie the channels that it makes."""
        self._made.add(id(labels))

    def maker(self, name: str) -> tuple[str, int]:
        dims = self.parameters[name].dims
        along = next((d for d, labels in enumerate(dims) if id(labels) in self._made), 0)
        if re.match(r"onnx::|val_|const|_|\d", name):  # exporters number what had no name
            name = self._users.get(name, name)
        # TensorFlow's begins with the layer and goes on with what is done to the variable
        return re.sub(r"\.weight$|(/(ReadVariableOp|merged_input|Cast|convolution|MatMul))*:0$", "", name), along


def trace_onnx(network: Network, inputs: Mapping[str, Sequence[int]] | None = None) -> OnnxTrace:
    """Trace a model. ``inputs`` are example sizes of its inputs where it leaves them open. Raises UsageError."""
    import secateur.structure.onnx.rules  # noqa: F401  (registers them)

    sizes = example_inputs(network, inputs or {})
    found = OnnxTrace(network=network, shapes=Shapes(network, sizes), larger=Shapes(network, doubled(network, sizes)))
    for info in network.inputs:
        shape = found.shapes.shape(info.name)
        if shape is not None:
            found.values[info.name] = found.fixed(shape, "input of the network")
    for number, node in enumerate(network.nodes):
        found.shapes.add(node)
        found.larger.add(node)
        _visit(found, number, node)
    for info in network.model.graph.output:
        _place(found, info.name, "")
        if info.name in found.values:
            found.pin(found.values[info.name], "output of the network")
    return found


def _visit(trace: OnnxTrace, number: int, node: Node) -> None:
    for name in inputs_of(node):
        _place(trace, name, _module(node))
    given = [trace.values.get(name) if name else None for name in inputs_of(node)]
    outputs = [name for name in node.output if name]
    shapes = [trace.shapes.shape(name) for name in outputs]
    here = tuple(s for s in shapes if s is not None)
    call = Call(number, operator(node), {"inputs": given, **attributes(node)}, here, trace.network.describe)
    unknown = next((n for n in inputs_of(node) if n and n not in trace.values), None)
    missing = next((n for n, s in zip(outputs, shapes, strict=True) if s is None), None)
    if unknown or missing:
        values = trace.freeze(call, f"the shape of {unknown or missing} isn't known")
    else:
        known = RULES.get(call.name) or OnnxRule(partial(_none, closed=bool(subgraphs(node))))
        trace.pin(
            [v for at in known.settings if (v := _at(given, at)) is not None], f"{call.where} reads sizes from it"
        )
        values = _quietly(trace, call, known) if _computed(trace, outputs) else trace.ruled(call, known.says)
    trace.values |= dict(zip([n for n, s in zip(outputs, shapes, strict=True) if s is not None], values, strict=True))


def _place(trace: OnnxTrace, name: str, user: str) -> None:
    """Labels of an initialiser at its first use."""
    if name in trace.values or name not in trace.network.initializers:
        return
    trace.values[name] = trace.parameters[name] = trace.fresh(tuple(trace.network.initializers[name].dims))
    trace._users[name] = user


def _module(node: Node) -> str:
    """``encoder.fc1`` for the node ``/encoder/fc1/MatMul``, or as torch's exporter says."""
    said = next((e.value for e in node.metadata_props if e.key == "pkg.torch.onnx.name_scopes"), "")
    scopes = re.findall(r"'([^']*)'", said)
    if len(scopes) > 1 and scopes[-2]:
        return scopes[-2]
    path, _, leaf = node.name.strip("/").rpartition("/")
    return path.replace("/", ".") if path and leaf.startswith(node.op_type) else node.name or node.output[0]


def _at(given: Sequence[Value | None], at: int) -> Value | None:
    return given[at] if at < len(given) else None


def _computed(trace: OnnxTrace, outputs: Sequence[str]) -> bool:
    return bool(outputs) and all(name in trace.shapes.known for name in outputs)


def _quietly(trace: OnnxTrace, call: Call, known: Rule) -> list[Value]:
    """An operator between sizes isn't worth listing, with or without a rule."""
    listed = {name: list(places) for name, places in trace.unknown.items()}
    values = trace.ruled(call, known.says)
    trace.unknown = listed
    return values


def _none(trace: OnnxTrace, call: Call, closed: bool) -> Value:
    raise NoRule("it holds a graph of its own" if closed else "it has no rule")


def operands(call: Call, count: int) -> list[Any]:
    """The first inputs of a call, None for those that it goes without."""
    return [*call["inputs"], *[None] * count][:count]


def shared(function: Callable[..., Any], trace: OnnxTrace, call: Call, name: str, **arguments: Any) -> Any:
    """What the rule of an ATen operator says, with ONNX's arguments under ATen's names."""
    return function(trace, replace(call, name=name, arguments=arguments))
