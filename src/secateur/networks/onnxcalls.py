"""The calls of an ONNX model by themselves: what they are called in tables, and running one alone in onnxruntime."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from secateur.errors import require_extra
from secateur.latencytable import LatencyTable
from secateur.networks.widths import TimedCall, Width, Widths
from secateur.structure.groups import TracedAnatomy
from secateur.structure.kept import Kept
from secateur.structure.onnx.cut import Cutter
from secateur.structure.onnx.network import Array, Node, attributes, inputs_of, operator
from secateur.structure.onnx.session import open_session
from secateur.structure.onnx.single import single_call
from secateur.structure.onnx.trace import OnnxTrace

if TYPE_CHECKING:
    import onnx

_VIEWS = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Dropout")
"""Operators that move nothing."""
_MOST_SHOWN = 64
"""Entries of settings that the name of a call tells."""
_WHY = "timing ONNX models"


@dataclass(eq=False)
class Run:
    """A call of a model in onnxruntime on random inputs of the sizes that it states, or of ``sizes``."""

    model: onnx.ModelProto
    sizes: Mapping[str, Sequence[int]]
    source: Any = None
    """The file that the model came from, which may hold more than fits into a message."""

    def __call__(self) -> None:
        session, bound = self._ready
        session.run_with_iobinding(bound)

    @cached_property
    def _ready(self) -> tuple[Any, Any]:
        # at the first call, which warms up and isn't counted
        session = open_session(self.source or self.model, why=_WHY)
        random, bound = np.random.default_rng(0), session.io_binding()
        elements = {info.name: info.type.tensor_type.elem_type for info in self.model.graph.input}
        for one in session.get_inputs():
            bound.bind_cpu_input(one.name, _drawn(random, elements[one.name], self.sizes[one.name]))
        for one in session.get_outputs():
            bound.bind_output(one.name)
        return session, bound


def _drawn(random: np.random.Generator, element: int, shape: Sequence[int]) -> Array:
    """Numbers between 0 and 1, since some are variances; indices are 0, which is never out of bounds."""
    from onnx import helper

    dtype = helper.tensor_dtype_to_np_dtype(element)
    return np.zeros(shape, dtype) if dtype.kind in "biu" else random.random(shape).astype(dtype)


@dataclass(frozen=True)
class OnnxCalls:
    """A model and its calls as they are timed, see ``latency.Calls``.

    Calls that never shrink aren't timed alone: they are part of what the network takes beside the others.
    """

    anatomy: TracedAnatomy
    source: Any
    device = torch.device("cpu")
    title = "ONNX model"

    @property
    def _trace(self) -> OnnxTrace:
        return self.anatomy.trace

    def about(self, table: LatencyTable) -> str:
        return table.about_onnx

    def found(self, step: int) -> list[TimedCall]:
        return [call for call in self._all(step) if call.widths]

    def _all(self, step: int) -> Iterator[TimedCall]:
        widths, trace = Widths(self.anatomy, step), self._trace
        for number, node in enumerate(trace.network.nodes):
            names = dict.fromkeys(name for name in (*inputs_of(node), *node.output) if name)
            computed = all(name in trace.shapes.known for name in node.output if name)
            if computed or operator(node) in _VIEWS:
                continue
            mine = widths.of(trace.values[name] for name in names if name in trace.values)
            yield TimedCall(number, mine, self._key(node, widths, mine) + widths.place(mine, "onnxruntime cpu"))

    def signature(self, calls: Sequence[TimedCall], step: int) -> list[str]:
        return [call.key for call in self._all(step)]

    def describe(self, call: TimedCall) -> str:
        return self._trace.network.describe(call.node)

    @contextmanager
    def ready(self, table: LatencyTable) -> Iterator[None]:
        table.onnxruntime = table.onnxruntime or require_extra("onnxruntime", "onnx", _WHY).__version__
        yield

    def alone(self, call: TimedCall, removed: set[int]) -> Callable[[], object]:
        kept, values = Kept(self._trace.units, removed), self._trace.values
        model = single_call(self._trace, call.node, removed)
        return Run(model, {info.name: kept.shape(values[info.name]) for info in model.graph.input})

    def whole(self, removed: set[int]) -> Callable[[], object]:
        trace = self._trace
        sizes = {info.name: trace.shapes.shape(info.name) or () for info in trace.network.inputs}
        if not removed:
            return Run(trace.network.model, sizes, self.source)
        return Run(Cutter(trace, Kept(trace.units, removed)).model, sizes)

    def _key(self, node: Node, widths: Widths, mine: Sequence[Width]) -> str:
        """``Conv(float32[8, 64a, 56, 56], …, strides=[2, 2])``: everything that the time of a call depends on."""
        from onnx import helper

        trace = self._trace

        def shown(name: str) -> str:
            entries, value = trace.shapes.known.get(name), trace.values.get(name)
            if entries is not None and entries.dtype.kind in "iu" and entries.size <= _MOST_SHOWN:
                return str(entries.tolist())
            if value is None:
                return name and "?"
            kind = helper.tensor_dtype_to_np_dtype(trace.shapes.element(name))
            return f"{kind}[{widths.sizes(value, mine)}]"

        given = [f"{name}={_setting(value)}" for name, value in sorted(attributes(node).items())]
        return f"{operator(node)}({', '.join([*map(shown, node.input), *given])})"


def _setting(value: Any) -> str:
    """An attribute: a number, a text or some of them; of a graph or a tensor only that it is there."""
    plain = isinstance(value, str | int | float | list) and "\n" not in str(value)
    return str(value) if plain else type(value).__name__
