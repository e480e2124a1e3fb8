"""Tracing: the graph of any module, with the labels of every dimension of every tensor in it.

``torch.export`` runs the module once on fake tensors and gives a flat graph of ATen operators; then the rule of every
operator (``structure/rules``) says which positions of its inputs and outputs leave together. An operator without a rule
keeps everything that it touches, and is listed with the line of the user's code that called it. Nothing is guessed.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from secateur.errors import UnsupportedModelError, UsageError
from secateur.structure.exporting import Exported, export, record
from secateur.structure.traced import SAMPLES, Call, NoRule, Rule, Step, Traced, Value, Zeros

__all__ = ["RULES", "Call", "NoRule", "Trace", "Value", "Zeros", "rule", "trace"]

R = TypeVar("R", bound="Callable[[Trace, Call], Value | Sequence[Value]]")

RULES: dict[str, Rule] = {}
"""Operator (``aten::view`` or, for one overload, ``aten::slice.Tensor``) → its rule."""


def rule(*operators: str, zeros: Zeros | str = Zeros.LOST) -> Callable[[R], R]:
    """Register the rule of an operator, as in ``@sc.rule("my::op", zeros="pointwise")``.

    A rule gets the trace and the call, says on ``trace.units`` what leaves together, and returns the value of the
    output, one per output. ``zeros`` is what the operator makes of zeros, one of ``Zeros`` or its value; while nothing
    is known of that, groups that reach a sum through it are marked ``inexact``. Raises UsageError for an operator that
    has a rule already and for other values of ``zeros``.
    """
    made_of = _zeros(zeros)

    def register(function: R) -> R:
        for name in operators:
            if name in RULES:
                raise UsageError(f"operator {name} has a rule already")
            RULES[name] = Rule(function, made_of)
        return function

    return register


def _zeros(said: Zeros | str) -> Zeros:
    try:
        return Zeros(said)
    except ValueError:
        raise UsageError(f"zeros is {said!r}, not one of {', '.join(z.value for z in Zeros)}") from None


@dataclass
class Trace(Traced):
    """A traced module."""

    module: nn.Module
    exported: Exported
    graph: fx.Graph
    dynamic_shapes: Any = None
    """What ``torch.export`` was told of sizes that stay free."""
    values: dict[fx.Node, Value | list[Value]] = field(default_factory=dict)
    alone: tuple[str, ...] = ()
    """Parameters and buffers that no call reads, in training neither as far as that is known."""
    recorded: tuple[str, ...] = ()
    """Those that training reads, as far as the example inputs show: their branches can't be exported."""
    _constants: dict[fx.Node, Tensor | None] = field(default_factory=dict)

    def constant(self, node: fx.Node | Any) -> Tensor | None:
        """The tensor that a node gives whatever the inputs and the parameters are, or None."""
        if not isinstance(node, fx.Node):
            return None
        if node not in self._constants:
            self._constants[node] = None
            self._constants[node] = self._evaluate(node)
        return self._constants[node]

    def _evaluate(self, node: fx.Node) -> Tensor | None:
        if node.op == "get_attr":
            given = attribute(node.graph.owning_module, str(node.target))  # type: ignore[arg-type]
            constant = isinstance(given, Tensor) and not isinstance(given, nn.Parameter) and not given.is_meta
            return given if constant and not any(writes(user) for user in node.users) else None
        example = node.meta.get("val")
        if node.op != "call_function" or not isinstance(example, Tensor) or example.numel() > 1 << 24:
            return None
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            return None
        inputs = [self.constant(n) for n in node.all_input_nodes]
        if any(i is None for i in inputs):
            return None
        by_node = dict(zip(node.all_input_nodes, inputs, strict=True))
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: by_node[n])
        with torch.no_grad():
            return node.target(*args, **kwargs)  # type: ignore[operator]

    # -- what is known at the end --------------------------------------------------------------------------------

    @property
    def title(self) -> str:
        return type(self.module).__name__

    def element_sizes(self) -> dict[str, int]:
        named = self.module.named_parameters(remove_duplicate=False)
        return {name: parameter.element_size() for name, parameter in named}

    def steps(self) -> list[Step]:
        found: list[Step] = []
        number: dict[fx.Node, int] = {}
        for node in self.calls():
            inputs = node.all_input_nodes
            if node.target is operator.getitem and inputs[0] in number:
                number[node] = number[inputs[0]]
                continue
            outputs, schema = self.values[node], getattr(node.target, "_schema", None)
            step = Step(
                operator=(schema.name if schema else str(node.target)).rpartition("::")[2],
                where=module_of(node),
                sources=tuple(dict.fromkeys(number[n] for n in inputs if n in number)),
                parameters={str(n.target): self.value(n) for n in inputs if n.op == "get_attr" and self.values[n]},
                outputs=tuple(outputs) if isinstance(outputs, list) else (outputs,),
            )
            number[node] = len(found)
            found.append(step)
        return found

    def value(self, node: fx.Node) -> Value:
        """The value of a node with one output."""
        found = self.values[node]
        return found if isinstance(found, Value) else found[0]

    def unmasked(self) -> Collection[str]:
        """Constants that export made."""
        tensors = {name for name, _ in self.module.named_parameters(remove_duplicate=False)}
        tensors |= {name for name, _ in self.module.named_buffers(remove_duplicate=False)}
        return self.parameters.keys() - tensors

    def zeros(self, call: Call) -> Zeros:
        return _look_up(call.node).zeros

    def sampled(self, call: Call, zero: Collection[int]) -> NDArray[Any] | None:
        found = []
        random = torch.Tag.nondeterministic_seeded in getattr(call.node.target, "tags", ())
        for numbers in SAMPLES:
            operands = cycle(numbers)

            def entry(node: fx.Node, operands: Iterator[float] = operands) -> Any:
                example = node.meta.get("val")
                if not isinstance(example, Tensor):
                    return hint(example)
                constant = self.constant(node) if example.dim() == 0 else None
                if constant is not None:
                    return constant.cpu()
                number = 0.0 if id(self.values[node]) in zero else next(operands)
                return torch.full([1] * min(example.dim(), 1), of_type(number, example.dtype), dtype=example.dtype)

            args, kwargs = fx.map_arg((call.node.args, call.node.kwargs), entry)
            if "device" in kwargs:
                kwargs = {**kwargs, "device": "cpu"}
            try:
                # dropout draws numbers, and those of the caller are left alone
                with torch.no_grad(), torch.random.fork_rng(devices=[], enabled=random):
                    made = call.node.target(*args, **kwargs)
                many = made if isinstance(made, list | tuple) else [made]
                found += [float(tensor) for tensor in many if tensor.numel()]
            except Exception:  # not on single entries, not on a processor, complex: nothing is known of it then
                return None
        return np.array(found)

    def unread(self) -> list[str]:
        """Parameters and buffers that no call reads, under none of their names."""
        placed = [n for n in self.graph.nodes if n.op == "get_attr" and str(n.target) in self.parameters]
        read = {id(self.values[n]) for n in placed if n.users}
        return [str(n.target) for n in placed if id(self.values[n]) not in read]

    def calls(self) -> Iterator[fx.Node]:
        """The nodes that compute, in order."""
        yield from (n for n in self.graph.nodes if n.op == "call_function")


def of_type(number: float, dtype: torch.dtype) -> float:
    """A number, or its sign or its size where entries are of another type."""
    if dtype == torch.bool:
        return number > 0
    return number if dtype.is_floating_point else float(math.ceil(abs(number)))


def writes(node: fx.Node) -> bool:
    """Whether a call changes one of its arguments, such as a buffer that counts."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def trace(
    module: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    free: Sequence[Sequence[int]] = (),
) -> Trace:
    """Trace ``module`` called with ``args`` and ``kwargs``; it is left as it is.

    ``dynamic_shapes`` are those of ``torch.export``, and ``free`` are the dimensions of every input that must then be
    free. Raises UnsupportedModelError, also when the module's own code fixes one of them.
    """
    import secateur.structure.rules  # noqa: F401  (registers them)

    exported = export(module, args, kwargs, known=has_rule, dynamic_shapes=dynamic_shapes)
    found = Trace(module, exported, exported.graph_module().graph, dynamic_shapes)
    _check_free(found, free)
    tensors: dict[int, Value] = {}
    for node in found.graph.nodes:
        if node.op != "output":
            found.values[node] = _visit(found, node, tensors)
    for node in found.graph.output_node().all_input_nodes:
        found.pin(found.values[node], "output of the network")
    _follow_training(found, args, kwargs, tensors)
    return found


def _follow_training(
    trace: Trace, args: Sequence[Any], kwargs: Mapping[str, Any] | None, tensors: dict[int, Value]
) -> None:
    """Couple what is read in training only, such as a second head, to the channels that it reads; its own stay.

    ``alone`` is what that can't be said of: nothing reads it, or the branches for training can neither be exported nor
    recorded.
    """
    unread = trace.unread()
    trace.alone = tuple(unread)
    if {name for name, _ in trace.module.named_parameters(remove_duplicate=False)}.intersection(unread):
        with suppress(UnsupportedModelError, UsageError):
            branch = _visit_branches(trace, unread, args, kwargs, tensors)
            trace.alone = tuple(name for name in unread if name not in branch)
    read = [d for name, dims in trace.distinct_parameters().items() if name not in unread for d in dims]
    units = {u for labels in read for u in trace.units.table(labels).reshape(-1).tolist()} | {-1}
    for labels in [labels for name in unread for labels in trace.parameters[name].dims]:
        own = [not units.issuperset(row) for row in trace.units.table(labels).tolist()]
        trace.units.pin(labels[own], "the traced forward never reads it")


def _visit_branches(
    trace: Trace,
    unread: Sequence[str],
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    tensors: dict[int, Value],
) -> set[str]:
    """Apply the rules to the calls in branches for training that read these parameters; returns those that are.

    Where no export holds for all inputs, the calls are those made for the example inputs.
    """
    exported, dynamic = trace.exported, trace.dynamic_shapes
    try:
        exported = export(trace.module, args, kwargs, known=has_rule, dynamic_shapes=dynamic, training=True)
        whole = exported.graph_module()
    except UnsupportedModelError:
        whole = record(trace.module, args, kwargs)
    graph = whole.graph
    branch = {n for n in graph.nodes if n.op == "get_attr" and str(n.target) in unread and n.users}
    read = {str(n.target) for n in branch}
    for node in graph.nodes:
        if node.op == "call_function" and branch.intersection(node.all_input_nodes):
            branch.add(node)
    needed = set(branch)
    for node in reversed(graph.nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    also = Trace(trace.module, exported, graph, dynamic, units=trace.units)
    for node in graph.nodes:
        if node in needed and node.op != "output":
            also.values[node] = _visit(also, node, tensors)
    for node in branch.intersection(graph.output_node().all_input_nodes):
        also.pin(also.values[node], "output of the network in training")
    if exported is trace.exported:
        trace.recorded = tuple(name for name in unread if name in read)
    return read


def _visit(trace: Trace, node: fx.Node, tensors: dict[int, Value]) -> Value | list[Value]:
    if node.op == "placeholder":
        return trace.fixed(sizes(node.meta.get("val")), "input of the network")
    return _place_tensor(trace, node, tensors) if node.op == "get_attr" else _apply_rule(trace, node)


def _check_free(trace: Trace, free: Sequence[Sequence[int]]) -> None:
    inputs = [n for n in trace.graph.nodes if n.op == "placeholder"]
    for node, dims in zip(inputs, free, strict=False):
        for dim in dims:
            size = node.meta["val"].shape[dim]
            if not isinstance(size, torch.SymInt) or size.node.expr.is_number:
                raise UnsupportedModelError(
                    f"dimension {dim} of input {node.target} can't stay free: the code of {trace.title} fixes it at"
                    f" {size}"
                )


def _place_tensor(trace: Trace, node: fx.Node, tensors: dict[int, Value]) -> Value | list[Value]:
    """Labels of a parameter, a buffer or a constant are fresh; a tied tensor has one value."""
    tensor = attribute(node.graph.owning_module, str(node.target))  # type: ignore[arg-type]
    if not isinstance(tensor, Tensor):
        return []
    if id(tensor) not in tensors:
        tensors[id(tensor)] = trace.fresh(tensor.shape)
    trace.parameters[str(node.target)] = tensors[id(tensor)]
    return tensors[id(tensor)]


def has_rule(node: fx.Node) -> bool:
    """Whether it is known what a call couples."""
    if node.target is operator.getitem or not _holds_tensors(node.meta.get("val")):
        return True
    return _look_up(node) is not _UNKNOWN


def attribute(module: nn.Module, name: str) -> Any:
    """``module.a.b.c`` for ``"a.b.c"``."""
    path, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(path), leaf)


def _apply_rule(trace: Trace, node: fx.Node) -> Value | list[Value]:
    if node.target is operator.getitem:
        source = trace.values[node.args[0]]  # type: ignore[index]
        return source[node.args[1]] if isinstance(source, list) else source  # type: ignore[index]
    outputs = node.meta.get("val")
    if not _holds_tensors(outputs):
        return []
    call = _bind(trace, node)
    values = trace.ruled(call, _look_up(node).says)
    return values if isinstance(outputs, list | tuple) else values[0]


def _look_up(node: fx.Node) -> Rule:
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return _UNKNOWN
    full = f"{schema.name}.{schema.overload_name}" if schema.overload_name else schema.name
    for name in (full, schema.name):
        if name in RULES:
            return RULES[name]
    return RULES["pointwise"] if torch.Tag.pointwise in node.target.tags else _UNKNOWN  # type: ignore[union-attr]


def _unknown(trace: Trace, call: Call) -> Value:
    raise NoRule("it has no rule")


_UNKNOWN = Rule(_unknown)


def _bind(trace: Trace, node: fx.Node) -> Call:
    schema = getattr(node.target, "_schema", None)
    names = [a.name for a in schema.arguments] if schema is not None else []
    named = dict(zip(names, node.args, strict=False)) if schema else {str(i): a for i, a in enumerate(node.args)}
    for argument in schema.arguments if schema else ():
        if argument.has_default_value():
            named.setdefault(argument.name, argument.default_value)
    named |= node.kwargs
    arguments = {name: _with_values(trace, argument) for name, argument in named.items()}
    outputs = node.meta["val"]
    shapes = tuple(sizes(o) for o in (outputs if isinstance(outputs, list | tuple) else [outputs]))
    return Call(node, schema.name if schema else str(node.target), arguments, shapes, describe)


def _with_values(trace: Trace, argument: Any) -> Any:
    """Tensors become values, dynamic sizes those of the example."""

    def look_up(node: fx.Node) -> Any:
        value = node.meta.get("val")
        return trace.values[node] if _holds_tensors(value) else hint(value)

    if isinstance(argument, fx.Node):
        return look_up(argument)
    if isinstance(argument, list | tuple):
        return [_with_values(trace, a) for a in argument]
    return argument


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(isinstance(v, Tensor) for v in value)
    return isinstance(value, Tensor)


def hint(size: Any) -> Any:
    """A size as a number: that of the example where it is dynamic."""
    if isinstance(size, torch.SymInt):
        return int(size.node.hint) if size.node.has_hint() else int(size)
    return size


def sizes(example: Any) -> tuple[int, ...]:
    """The shape of a fake tensor in numbers; () for what isn't one."""
    return tuple(hint(n) for n in example.shape) if isinstance(example, Tensor) else ()


def describe(node: fx.Node) -> str:
    """``aten::view (blocks.0.attn, model.py:97)``."""
    schema = getattr(node.target, "_schema", None)
    name = schema.name if schema is not None else getattr(node.target, "__name__", str(node.target))
    places = [p for p in (module_of(node), source_line(node)) if p]
    return f"{name} ({', '.join(places)})" if places else name


def module_of(node: fx.Node) -> str:
    """Path of the innermost module that made this call."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(list(stack.values())))[0] if stack else ""
    return path.removeprefix("L['self'].").removeprefix("L['self']")


def source_line(node: fx.Node) -> str:
    """``file.py:97`` of the innermost line of code outside torch that made this call."""
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines()]
    calls = [line.split('"') for line in lines if line.startswith('File "')]
    outside = [c for c in calls if "/torch/" not in c[1]] or calls
    if not outside:
        return ""
    path, rest = outside[-1][1], outside[-1][2]
    return f"{path.rsplit('/', 1)[-1]}:{rest.split('line ')[1].split(',')[0]}"
