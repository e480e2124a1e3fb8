"""The cut graph: the exported program with smaller parameters and its sizes rewritten; and the reference it must equal.

Every tensor of the cut graph is computed once more on fake tensors and must have the shape that the labels foresee, so
what is handed back runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from secateur.errors import PlanError, UnsupportedModelError
from secateur.structure.exporting import quiet
from secateur.structure.resize import Cut, Unfit, named_arguments, resized
from secateur.structure.trace import Trace, Value, attribute, describe, sizes


def cut_tensor(cut: Cut, value: Value, tensor: Tensor) -> Tensor:
    """The tensor without what leaves; itself when nothing does. A parameter stays one."""
    if not cut.touches(value):
        return tensor
    result = tensor.detach()
    for dim, labels in enumerate(value.dims):
        index = cut.index(labels)
        if index is not None:
            result = result.index_select(dim, index.to(result.device))
    return nn.Parameter(result, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else result


def zero_tensor(cut: Cut, value: Value, tensor: Tensor) -> Tensor:
    """The tensor with zeros at what leaves."""
    for dim, labels in enumerate(value.dims):
        gone = ~cut.kept(labels)
        if gone.any():
            tensor = tensor.index_fill(dim, torch.from_numpy(gone.nonzero()[0]).to(tensor.device), 0)
    return tensor


def cut_graph(cut: Cut) -> fx.GraphModule:
    """The network as a ``GraphModule`` with the parameters' own names, which trains and can be exported again.

    Raises PlanError when nothing would be left of a parameter, UnsupportedModelError when a call can't be written for
    the new sizes.
    """
    _check_something_stays(cut)
    made = cut.trace.exported.graph_module()
    for name in ("train", "eval"):
        # torch puts methods in their place that only raise, and what trains or measures a network calls them
        made.__dict__.pop(name, None)
    done: dict[int, Tensor] = {}
    by_node: dict[fx.Node, fx.Node] = {}
    for old, new in zip(cut.trace.graph.nodes, list(made.graph.nodes), strict=True):  # type: ignore[union-attr]
        by_node[old] = new
        if old.op == "get_attr":
            _replace(cut, made, old, done)
        elif old.op == "call_function" and hasattr(old.target, "_schema"):
            _rewrite(cut, made, by_node, old)  # type: ignore[arg-type]
    _check(cut, made, by_node)  # type: ignore[arg-type]
    made.recompile()  # type: ignore[operator]
    return made  # type: ignore[return-value]


def _check_something_stays(cut: Cut) -> None:
    # units of several groups can lie on the same positions, so that no group need lose all of its own
    for name, value in cut.trace.parameters.items():
        for dim, labels in enumerate(value.dims):
            if len(labels) and not cut.size(labels):
                raise PlanError(f"nothing would be left of {name} along dimension {dim}: keep one of its positions")


def _replace(cut: Cut, made: nn.Module, node: fx.Node, done: dict[int, Tensor]) -> None:
    """Put the cut tensor of a ``get_attr`` in place; nothing is shared with the module that was traced."""
    name, value = str(node.target), cut.trace.parameters.get(str(node.target))
    if value is None:
        return
    tensor = attribute(made, name)
    if id(tensor) not in done:
        result = cut_tensor(cut, value, tensor)
        if result is tensor:
            copied = tensor.detach().clone()
            result = nn.Parameter(copied, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copied
        done[id(tensor)] = done[id(result)] = result
    path, _, leaf = name.rpartition(".")
    setattr(made.get_submodule(path), leaf, done[id(tensor)])


def _rewrite(cut: Cut, made: fx.GraphModule, by_node: Mapping[fx.Node, fx.Node], old: fx.Node) -> None:
    try:
        found = resized(cut, old)
    except Unfit as error:
        raise UnsupportedModelError(f"can't cut through {describe(old)}: {error}") from None
    if found is None:
        return
    new = by_node[old]
    target, arguments = found
    with made.graph.inserting_before(new):
        arguments = {name: _with_constants(made, argument) for name, argument in arguments.items()}
    new.target = target
    new.args, new.kwargs = _positional(target, dict(fx.map_arg(arguments, lambda n: by_node.get(n, n))))


def _positional(target: Any, given: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) of a call, from all its arguments by name."""
    names = [a.name for a in target._schema.arguments if not a.kwarg_only]
    positional = [given.pop(name) for name in names[: _leading(names, given)]]
    return tuple(positional), given


def _leading(names: list[str], given: Mapping[str, Any]) -> int:
    """How many of the operator's first arguments are given."""
    return next((i for i, name in enumerate(names) if name not in given), len(names))


def _with_constants(made: fx.GraphModule, argument: Any) -> Any:
    """New constants become buffers of the module."""
    if isinstance(argument, list | tuple):
        return [_with_constants(made, a) for a in argument]
    if not isinstance(argument, Tensor):
        return argument
    number = sum(1 for name, _ in made.named_buffers() if name.startswith("kept_index_"))
    made.register_buffer(f"kept_index_{number}", argument)
    return made.graph.get_attr(f"kept_index_{number}")


def _check(cut: Cut, made: fx.GraphModule, by_node: Mapping[fx.Node, fx.Node]) -> None:
    """Run the cut graph on fake tensors: every output must have the shape that its labels foresee."""
    mode = next((n.meta["val"].fake_mode for n in made.graph.nodes if hasattr(n.meta.get("val"), "fake_mode")), None)
    mode = mode or FakeTensorMode()
    mode.allow_non_fake_inputs = True
    values: dict[fx.Node, Any] = {}
    dense = {new: old for old, new in by_node.items()}
    with mode, quiet(), torch.no_grad():
        for new in made.graph.nodes:
            if new.op == "placeholder":
                values[new] = new.meta.get("val")
            elif new.op == "get_attr":
                found = attribute(made, str(new.target))
                values[new] = mode.from_tensor(found.detach()) if isinstance(found, Tensor) else found
            elif new.op == "call_function":
                values[new] = _fake(dense[new], new, values)
                new.meta["val"] = values[new]
                _compare(cut, dense[new], values[new])


def _fake(old: fx.Node, new: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    args, kwargs = fx.map_arg((new.args, new.kwargs), lambda n: values[n])
    try:
        try:
            return new.target(*args, **kwargs)  # type: ignore[operator]
        except (RuntimeError, ValueError):
            if new.target is not torch.ops.aten.view.default:
                raise
            # kernels lay out some sizes differently, and then entries must be copied
            new.target = torch.ops.aten.reshape.default
            return new.target(*args, **kwargs)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UnsupportedModelError(f"can't cut through {describe(old)}: {first}") from None


def _compare(cut: Cut, old: fx.Node, result: Any) -> None:
    expected = cut.trace.values[old]
    results = list(result) if isinstance(result, list | tuple) else [result]
    for value, one in zip([expected] if isinstance(expected, Value) else expected, results, strict=False):
        if isinstance(one, Tensor) and list(sizes(one)) != cut.shape(value):
            raise UnsupportedModelError(
                f"can't cut through {describe(old)}: it gives {list(sizes(one))} where {cut.shape(value)} is due"
            )


def on_kept(cut: Cut, node: fx.Node, tensor: Callable[[fx.Node], Any]) -> Any:
    """Run one call of the traced graph on what stays of its inputs; ``tensor`` gives them in their dense shapes."""
    env = {}
    for source in node.all_input_nodes:
        value = cut.trace.values.get(source)
        env[source] = cut_tensor(cut, value, tensor(source)) if isinstance(value, Value) else tensor(source)
    target: Any = node.target
    target, arguments = resized(cut, node) or (target, named_arguments(node))
    if target is torch.ops.aten.view.default:
        # what was cut lies in memory in another way
        target = torch.ops.aten.reshape.default
        arguments["shape"] = arguments.pop("size")
    args, kwargs = _positional(target, dict(fx.map_arg(arguments, lambda source: env[source])))
    return target(*args, **kwargs)


def spread(cut: Cut, result: Any, value: Any, into: Any = None) -> Any:
    """What was computed on what stays, put back into dense shapes: among zeros, or ``into`` tensors that are there."""
    if not isinstance(result, Tensor):
        bases = into if into is not None else [None] * len(result)
        return type(result)(spread(cut, r, v, b) for r, v, b in zip(result, value, bases, strict=True))
    dense = result
    for dim, labels in enumerate(value.dims):
        index = cut.index(labels)
        if index is not None and dense.shape[dim] == len(index):
            shape = [*dense.shape[:dim], len(labels), *dense.shape[dim + 1 :]]
            dense = dense.new_zeros(shape).index_copy(dim, index.to(dense.device), dense)
    if into is None:
        return dense
    stays = dense.new_ones(result.shape, dtype=torch.bool)
    return torch.where(spread(cut, stays, value), dense, into)


class Reference(fx.Interpreter):
    """The dense graph in which everything that leaves is zero: what a cut must compute.

    Where an average runs over positions that leave, it is taken over those that stay.
    """

    def __init__(self, trace: Trace, removed: set[int], module: fx.GraphModule | None = None) -> None:
        super().__init__(module or trace.exported.graph_module(), garbage_collect_values=True)
        self._cut = Cut(trace, removed)
        self._dense: dict[fx.Node, fx.Node] = dict(zip(list(self.graph.nodes), trace.graph.nodes, strict=True))  # type: ignore[union-attr]

    def run_node(self, n: fx.Node) -> Any:
        old = self._dense[n]
        value = self._cut.trace.values.get(old)
        if old.op == "call_function" and old in self._cut.trace.averaging and self._touched(old):
            new = dict(zip(old.all_input_nodes, n.all_input_nodes, strict=True))
            result = spread(self._cut, on_kept(self._cut, old, lambda source: self.env[new[source]]), value)
        else:
            result = super().run_node(n)
        return self._zeroed(result, value)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        # a network may write into its buffers, which are the caller's
        found = super().get_attr(target, args, kwargs)
        return found.clone() if isinstance(found, Tensor) and not isinstance(found, nn.Parameter) else found

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is torch.ops.aten.view.default:
            # zeros are filled into tensors whose strides the graph doesn't foresee
            target = torch.ops.aten.reshape.default
        return super().call_function(target, args, kwargs)

    def _touched(self, old: fx.Node) -> bool:
        values = [self._cut.trace.values.get(i) for i in old.all_input_nodes]
        return any(isinstance(v, Value) and self._cut.touches(v) for v in values)

    def _zeroed(self, result: Any, value: Any) -> Any:
        if isinstance(result, list | tuple) and isinstance(value, list):
            return type(result)(self._zeroed(r, v) for r, v in zip(result, value, strict=False))
        if isinstance(result, Tensor) and isinstance(value, Value) and tuple(result.shape) == value.shape:
            return zero_tensor(self._cut, value, result)
        return result


def _holds_nodes(argument: Any) -> bool:
    found: list[fx.Node] = []
    fx.map_arg(argument, found.append)
    return bool(found)
