"""What stands in the calls of a cut ONNX graph: sizes, bounds, counts and indices, by kind of operator."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from secateur.errors import UnsupportedModelError
from secateur.structure.kept import Kept
from secateur.structure.onnx.network import Array, Node, attributes
from secateur.structure.onnx.rules.moving import bounds, padding
from secateur.structure.onnx.trace import OnnxTrace
from secateur.structure.traced import Call, Value
from secateur.structure.units import Labels


class Edit(Protocol):
    """One call of the cut graph, to be changed."""

    trace: OnnxTrace
    kept: Kept
    node: Node
    """Of the cut graph."""
    call: Call
    """Of the dense one."""
    outputs: list[Value]

    def want(self, at: int, entries: Array) -> None:
        """An input must hold these entries; those that change with dynamic sizes stay as they are computed."""
        ...

    def set(self, values: Mapping[str, Any]) -> None:
        """Give attributes these values; None takes one away."""
        ...

    def take(self, axis: int, index: Array) -> None:
        """Look positions of the first input up before the call."""
        ...


Resizer = Callable[[Edit], None]

RESIZERS: dict[str, Resizer] = {}


def resizer(*operators: str) -> Callable[[Resizer], Resizer]:
    """Register how an operator's settings follow a cut."""

    def register(function: Resizer) -> Resizer:
        RESIZERS.update(dict.fromkeys(operators, function))
        return function

    return register


def known(edit: Edit, at: int) -> Array | None:
    """The entries of an input in the dense graph."""
    inputs = edit.trace.network.node(edit.call.node).input
    return edit.trace.shapes.known.get(inputs[at]) if at < len(inputs) else None


def _first(edit: Edit) -> Value:
    return edit.call["inputs"][0]


@resizer("Reshape", "Expand", "ConstantOfShape")
def _sizes(edit: Edit) -> None:
    at = 0 if edit.call.name == "ConstantOfShape" else 1
    if at == 1 and "shape" in edit.call.arguments:
        edit.set({"shape": _resized(edit, np.array(edit.call["shape"])).tolist()})
        return
    old = known(edit, at)
    if old is None:
        raise UnsupportedModelError(f"can't cut through {edit.call.where}: its sizes are computed from data")
    edit.want(at, _resized(edit, old))


def _resized(edit: Edit, old: Array) -> Array:
    """-1 and 0 of a Reshape mean the same in the cut graph, and so does 1 of an Expand."""
    sizes = edit.kept.shape(edit.outputs[0])
    tail = np.array(sizes[len(sizes) - len(old) :], dtype=old.dtype)
    if edit.call.name == "Expand":
        return np.where(old == 1, old, tail)
    zero = edit.call.get("allowzero", 0) == 0 and edit.call.name == "Reshape"
    # where a copied size and the output's are cut apart, the size is written out
    ours = [d < len(_first(edit).dims) and edit.kept.size(_first(edit).dims[d]) == n for d, n in enumerate(sizes)]
    return np.where((old < 0) | ((old == 0) & np.array(ours, dtype=bool) & zero), old, tail)


@resizer("Tile")
def _times(edit: Edit) -> None:
    x, out = _first(edit), edit.outputs[0]
    sizes = [(edit.kept.size(o), edit.kept.size(i)) for o, i in zip(out.dims, x.dims, strict=True)]
    edit.want(1, np.array([o // max(1, i) for o, i in sizes], dtype=np.int64))


@resizer("Slice")
def _bounds(edit: Edit) -> None:
    dims, given = _first(edit).dims, attributes(edit.node)
    starts, ends = (
        np.array(given[name] if name in given else known(edit, at), dtype=np.int64)
        for at, name in ((1, "starts"), (2, "ends"))
    )
    taken = bounds(edit.trace, edit.call)
    moved = {axis for axis, _ in taken if not edit.kept.kept(dims[axis]).all()}
    if any(axis in moved and chosen is not None and (chosen.step or 1) != 1 for axis, chosen in taken):
        _look_up(edit, taken)
        raise Instead
    for at, (axis, chosen) in enumerate(taken):
        if axis in moved and chosen is not None:
            places = range(len(dims[axis]))[chosen]
            starts[at] = edit.kept.renumber(dims[axis], places.start)
            ends[at] = edit.kept.renumber(dims[axis], max(places.stop, places.start))
    if "starts" in given:
        edit.set({"starts": starts.tolist(), "ends": ends.tolist()})
        return
    edit.want(1, _typed(edit, 1, starts))
    edit.want(2, _typed(edit, 2, ends))


class Instead(Exception):
    """The look-ups before a call are all there is to it."""


def _look_up(edit: Edit, taken: Sequence[tuple[int, slice | None]]) -> None:
    """Every n-th position of fewer is another pattern: look up those that stay."""
    for axis, chosen in taken:
        if chosen is None:
            raise UnsupportedModelError(f"can't cut through {edit.call.where}: a part that it takes is computed")
        labels = _first(edit).dims[axis]
        edit.take(axis, renumbered(edit.kept, labels, np.arange(len(labels))[chosen]))


def _typed(edit: Edit, at: int, entries: Array) -> Array:
    old = known(edit, at)
    return entries.astype(old.dtype) if old is not None else entries


def renumbered(kept: Kept, labels: Labels, index: Array) -> Array:
    """A constant index into a dimension, without what leaves and by the new numbers."""
    stays = kept.kept(labels)
    index = index % len(labels)
    return (np.cumsum(stays) - 1)[index[stays[index]]].astype(index.dtype)


@resizer("Gather")
def _index(edit: Edit) -> None:
    x = _first(edit)
    labels = x.dims[edit.call.get("axis", 0)]
    index = edit.trace.constant(edit.call, 1)
    if index is not None and index.ndim == 1 and not edit.kept.kept(labels).all():
        edit.want(1, renumbered(edit.kept, labels, index))


@resizer("Split")
def _parts(edit: Edit) -> None:
    axis = edit.call.get("axis", 0)
    if edit.kept.kept(_first(edit).dims[axis]).all():
        return
    sizes = np.array([edit.kept.size(v.dims[axis]) for v in edit.outputs], dtype=np.int64)
    if edit.trace.network.opset >= 13:
        edit.set({"num_outputs": None})
        edit.want(1, sizes)
    else:
        edit.set({"split": sizes.tolist()})


@resizer("Pad")
def _pad(edit: Edit) -> None:
    """Cropped positions may have left already."""
    amounts = padding(edit.trace, edit.call)
    if (amounts >= 0).all():
        return
    x = _first(edit)
    for d, labels in enumerate(x.dims):
        for side, order in ((0, slice(None, None)), (1, slice(None, None, -1))):
            if amounts[side, d] < 0:
                amounts[side, d] = -int(edit.kept.kept(labels)[order][: -amounts[side, d]].sum())
    if "pads" in edit.call.arguments:
        edit.set({"pads": amounts.reshape(-1).tolist()})
        return
    axes = known(edit, 3)
    edit.want(1, amounts.reshape(-1) if axes is None else amounts[:, axes].reshape(-1))


@resizer("Resize")
def _resize(edit: Edit) -> None:
    old = known(edit, 3)
    if old is None or not old.size:
        return
    sizes = edit.kept.shape(edit.outputs[0])
    edit.want(3, np.array([sizes[a] for a in edit.call.get("axes", range(len(sizes)))], dtype=np.int64))


@resizer("Conv", "ConvTranspose")
def _groups(edit: Edit) -> None:
    groups, weight = edit.call.get("group", 1), edit.call["inputs"][1]
    if groups > 1:
        edit.set({"group": _nonempty(edit, weight.dims[0], groups)})


def _nonempty(edit: Edit, channels: Labels, groups: int) -> int:
    """How many of ``groups`` equal parts keep something."""
    return int(edit.kept.kept(channels).reshape(groups, -1).any(axis=1).sum())


@resizer("GroupNormalization")
def _norm_groups(edit: Edit) -> None:
    edit.set({"num_groups": _nonempty(edit, _first(edit).dims[1], edit.call["num_groups"])})


@resizer("LSTM", "GRU", "RNN")
def _hidden(edit: Edit) -> None:
    edit.set({"hidden_size": edit.kept.size(edit.call["inputs"][2].dims[2])})


@resizer("Attention")
def _heads(edit: Edit) -> None:
    """Scores were divided by the root of the old head size, which fewer lanes must not change."""
    q, k, *_ = edit.call["inputs"]
    merged = len(q.dims) == 3
    if not edit.call.get("scale"):
        lanes = len(q.dims[-1]) // (edit.call["q_num_heads"] if merged else 1)
        edit.set({"scale": lanes**-0.5})
    if merged:
        for name, value in (("q_num_heads", q), ("kv_num_heads", k)):
            edit.set({name: _nonempty(edit, value.dims[-1], edit.call[name])})
