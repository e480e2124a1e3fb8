"""Residual streams: channels that an addition of two activations carries past a block."""

from __future__ import annotations

from typing import cast

import numpy as np
from torch import fx

from secateur.structure.groups import TracedAnatomy
from secateur.structure.trace import Trace


def residual_streams(anatomy: TracedAnatomy) -> frozenset[str]:
    """Names of the groups whose channels are those of a sum of two tensors that both depend on the input.

    Sums along a dimension of which one operand has a single entry, as with a mask, carry no channels of it.
    """
    carried = _carried(cast(Trace, anatomy.trace))
    return frozenset(name for name, units in anatomy.ids.items() if not carried.isdisjoint(units))


def _carried(trace: Trace) -> set[int]:
    fed: set[fx.Node] = set()
    found: set[int] = set()
    for node in trace.graph.nodes:
        inputs = [n for n in node.all_input_nodes if n in fed]
        if node.op == "placeholder" or inputs:
            fed.add(node)
        if getattr(getattr(node.target, "_schema", None), "name", "") != "aten::add" or len(inputs) < 2:
            continue
        for back, labels in enumerate(reversed(trace.value(node).dims), start=1):
            if all(len(v.dims) >= back and len(v.dims[-back]) == len(labels) for v in map(trace.value, inputs)):
                found.update(np.unique(trace.units.table(labels)).tolist())
    return found
