"""The calls of a traced torch module by themselves: what they are called in tables, and running one alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from secateur.errors import UnsupportedModelError
from secateur.latencytable import LatencyTable
from secateur.networks.example import device_of
from secateur.networks.widths import TimedCall, Width, Widths
from secateur.structure.exporting import evaluation_mode
from secateur.structure.graphcut import cut_graph
from secateur.structure.groups import TracedAnatomy
from secateur.structure.resize import Cut, Unfit, named_arguments, resized
from secateur.structure.trace import Trace, Value, describe


@dataclass(frozen=True)
class ModuleCalls:
    """A module and its calls as they are timed, see ``latency.Calls``."""

    anatomy: TracedAnatomy
    module: nn.Module
    args: Sequence[Any]
    kwargs: Mapping[str, Any]

    @property
    def title(self) -> str:
        return type(self.module).__name__

    @property
    def device(self) -> torch.device:
        return device_of(self.module)

    def about(self, table: LatencyTable) -> str:
        return table.about

    def found(self, step: int) -> list[TimedCall]:
        return timed_calls(self.anatomy, step, self.device)

    def signature(self, calls: Sequence[TimedCall], step: int) -> list[str]:
        return [call.key for call in calls]

    def describe(self, call: TimedCall) -> str:
        return describe(call.node)

    @contextmanager
    def ready(self, table: LatencyTable) -> Iterator[None]:
        with evaluation_mode(self.module), torch.no_grad():
            yield

    def alone(self, call: TimedCall, removed: set[int]) -> Callable[[], object]:
        return _work(self.anatomy.trace, call.node, removed, self.device)

    def whole(self, removed: set[int]) -> Callable[[], object]:
        network = cut_graph(Cut(self.anatomy.trace, removed)) if removed else self.module
        return lambda: network(*self.args, **self.kwargs)


def timed_calls(anatomy: TracedAnatomy, step: int, device: torch.device) -> list[TimedCall]:
    """The calls of a traced module that compute something, views and lookups left out."""
    widths, trace = Widths(anatomy, step), anatomy.trace
    found = []
    for node in trace.calls():
        if _computes(node):
            mine = widths.of(_values(trace, node))
            found.append(TimedCall(node, mine, _key(trace, node, widths, mine) + widths.place(mine, device.type)))
    return found


def _computes(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    if schema is None or not isinstance(node.meta.get("val"), Tensor | list | tuple):
        return False
    return not any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)


def _values(trace: Trace, node: fx.Node) -> list[Value]:
    """The tensors that a call reads and makes."""
    found = [trace.values.get(n) for n in (*node.all_input_nodes, node)]
    return [v for one in found if one is not None for v in (one if isinstance(one, list) else [one])]


def _key(trace: Trace, node: fx.Node, widths: Widths, mine: Sequence[Width]) -> str:
    """``aten.conv2d.default(float32[8, 64a, 56, 56], …)``: everything that the time of a call depends on."""

    def shown(value: Any) -> str:
        if isinstance(value, fx.Node):
            example, place = value.meta.get("val"), trace.values.get(value)
            if isinstance(example, Tensor) and isinstance(place, Value):
                order = "" if example.is_contiguous() else f"{tuple(example.stride())}"
                kind = str(example.dtype).removeprefix("torch.")
                return f"{kind}[{widths.sizes(place, mine)}]{order}"
            return "node"
        if isinstance(value, list | tuple):
            return f"[{', '.join(map(shown, value))}]"
        return str(value)

    arguments = ", ".join(f"{name}={shown(value)}" for name, value in named_arguments(node).items())
    return f"{node.target}({arguments})"


def _work(trace: Trace, node: fx.Node, removed: set[int], device: torch.device) -> Callable[[], object]:
    """The call on random tensors of the cut sizes."""
    cut = Cut(trace, removed)
    try:
        target, arguments = resized(cut, node) or (node.target, named_arguments(node))
    except Unfit as error:
        raise UnsupportedModelError(f"can't time {describe(node)} alone: {error}") from None
    generator = torch.Generator(device).manual_seed(0)
    given = fx.map_arg(arguments, lambda n: _random(cut, n, generator, device))
    return lambda: target(**given)  # type: ignore[operator]


def _random(cut: Cut, node: fx.Node, generator: torch.Generator, device: torch.device) -> Any:
    example, value = node.meta.get("val"), cut.trace.values.get(node)
    if not isinstance(example, Tensor) or value is None:
        return example
    constant = cut.trace.constant(node)
    values = [value] if isinstance(value, Value) else value
    shape = cut.shape(values[0])
    if constant is not None and list(constant.shape) == shape:
        return constant.to(device)
    # laid out in memory like the example
    order = sorted(range(example.dim()), key=lambda dim: -int(example.stride(dim)))
    plain = torch.zeros([shape[dim] for dim in order], dtype=example.dtype, device=device)
    if example.is_floating_point():
        plain.uniform_(generator=generator)  # some are variances
    return plain.permute([order.index(dim) for dim in range(example.dim())])
