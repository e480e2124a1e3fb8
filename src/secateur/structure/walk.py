"""Running a traced graph call by call over all batches at once, so that a weight can change before it is used.

One pass is enough to change the weights in their order: what a call reads was computed with all that were changed
before. In a walk with a ``Cut`` what leaves is still there to be looked at, but never has a part in what stays: entries
that stay are those of the cut network. What is held at a time are the tensors of all batches that a later call needs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from secateur.structure.graphcut import on_kept, spread
from secateur.structure.readers import canonical_names, is_rearranged
from secateur.structure.resize import Cut
from secateur.structure.trace import Trace, attribute, writes

Tensors = Callable[[fx.Node], list[Tensor]]
"""A node that was computed → its tensor in every batch."""


@dataclass(eq=False)
class Batch:
    """One batch: the inputs in the order of the placeholders, and the trace of the network on such shapes.

    ``cut`` is what stays, in terms of that trace, or None.
    """

    trace: Trace
    inputs: tuple[Any, ...]
    cut: Cut | None = None
    _tensors: dict[fx.Node, Any] = field(default_factory=dict, init=False, repr=False)


class Walk:
    """One pass. Nodes are those of ``trace``, whatever traces the batches have, which must make the same calls.

    ``changed`` holds tensors that stand for parameters or buffers, by name; the module keeps its own. ``whole`` are
    calls that need no care with a cut, since what leaves has no weight there.
    """

    def __init__(self, trace: Trace, batches: Sequence[Batch], *, whole: Collection[fx.Node] = ()) -> None:
        self.trace = trace
        self.changed: dict[str, Tensor] = {}
        self._batches = batches
        self._whole = whole
        self._names = canonical_names(trace)
        self._nodes = list(trace.graph.nodes)
        self._order = [list(batch.trace.graph.nodes) for batch in batches]
        self._number = {node: k for k, node in enumerate(self._nodes)}

    def run(self, visit: Callable[[fx.Node, Tensors], None], until: fx.Node | None = None) -> list[Any]:
        """Call ``visit`` before every call that computes; returns the outputs of all batches, none with ``until``."""
        last = self._last_uses()
        for batch, order in zip(self._batches, self._order, strict=True):
            places = [node for node in order if node.op == "placeholder"]
            batch._tensors = dict(zip(places, batch.inputs, strict=True))
        for number, node in enumerate(self._nodes):
            computes = node.op == "call_function" and not self._lazy(node)
            if computes:
                visit(node, self._of_all)
            if node is until or node.op == "output":
                break
            for batch, order in zip(self._batches, self._order, strict=True):
                if computes:
                    batch._tensors[order[number]] = self._call(batch, order[number], node)
                for done in last.get(number, ()):
                    batch._tensors.pop(order[done], None)
        outputs = [self._outputs(batch) for batch in self._batches] if until is None else []
        for batch in self._batches:
            batch._tensors.clear()
        return outputs

    def tensor(self, name: str) -> Tensor:
        """A parameter or buffer as it is now."""
        return self.changed[name] if name in self.changed else attribute(self.trace.module, name).detach()

    def mixes(self, node: fx.Node) -> bool:
        """Whether what leaves could have a part in what stays in this call."""
        cut = self._batches[0].cut
        if cut is None or node in self._whole or not hasattr(node.target, "_schema"):
            return False
        if torch.Tag.pointwise in node.target.tags:  # type: ignore[union-attr]
            return False
        place = self._number[node]
        values = [cut.trace.values[source] for source in self._order[0][place].all_input_nodes]
        return any(cut.touches(v) for many in values for v in (many if isinstance(many, list) else [many]))

    def _last_uses(self) -> dict[int, list[int]]:
        """Number of a node → numbers of the nodes that nothing needs after it."""
        last: dict[int, int] = {}
        for node, number in self._number.items():
            for source in node.all_input_nodes:
                last[self._number[source]] = number
        found: dict[int, list[int]] = {}
        for source, number in last.items():
            found.setdefault(number, []).append(source)
        return found

    def _of_all(self, node: fx.Node) -> list[Tensor]:
        number = self._number[node]
        return [self._value(batch, order[number]) for batch, order in zip(self._batches, self._order, strict=True)]

    def _lazy(self, node: fx.Node) -> bool:
        """Parameters, and what only rearranges them: taken anew at every use, since they change."""
        if node.op == "get_attr":
            return True
        inputs = node.all_input_nodes
        return node.op == "call_function" and len(inputs) == 1 and is_rearranged(node) and self._lazy(inputs[0])

    def _value(self, batch: Batch, node: fx.Node) -> Any:
        if node in batch._tensors:
            return batch._tensors[node]
        if node.op == "get_attr":
            return self._attribute(batch, node)
        return self._run(batch, node)

    def _attribute(self, batch: Batch, node: fx.Node) -> Any:
        name = self._names.get(str(node.target), str(node.target))
        if name in self.changed:
            return self.changed[name]
        found = attribute(batch.trace.graph.owning_module, str(node.target))  # type: ignore[arg-type]
        if isinstance(found, nn.Parameter):
            return found.detach()
        # a network may write into its buffers, which are the caller's
        return found.clone() if isinstance(found, Tensor) and any(map(writes, node.users)) else found

    def _call(self, batch: Batch, mine: fx.Node, node: fx.Node) -> Any:
        result = self._run(batch, mine)
        if batch.cut is None or not self.mixes(node):
            return result
        kept = on_kept(batch.cut, mine, lambda source: self._value(batch, source))
        return spread(batch.cut, kept, batch.trace.values[mine], into=result)

    def _run(self, batch: Batch, node: fx.Node) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: self._value(batch, source))
        target: Any = node.target
        if target is torch.ops.aten.view.default:
            # tensors need not lie in memory as they did in the trace
            target = torch.ops.aten.reshape.default
        return target(*args, **kwargs)

    def _outputs(self, batch: Batch) -> Any:
        output = batch.trace.graph.output_node()
        return fx.map_arg(output.args[0], lambda source: self._value(batch, source))
