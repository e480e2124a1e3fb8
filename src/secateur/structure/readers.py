"""Weights that read channels: calls that sum over the channels of an input, written as products of matrices.

A linear layer, a convolution and a product with a parameter are all  y = W x, with W [outputs, columns] and one row x
for every place at which the weight is applied. A column is a channel, in a convolution a channel at one position of the
kernel; each group of a grouped convolution is a matrix of its own. Where an entry of the matrix lies in the parameter
is found by moving indices instead of numbers through the calls that rearrange it, so slices and transposes of a
parameter are read as well.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from secateur.structure.resize import named_arguments
from secateur.structure.trace import Trace, attribute
from secateur.structure.units import Labels

# they rearrange entries and compute nothing
_MOVES = ("t", "transpose", "permute", "view", "reshape", "_unsafe_view", "slice", "select", "split", "chunk")
_MOVES += ("split_with_sizes", "narrow", "unsqueeze", "squeeze", "unbind", "flatten", "unflatten", "contiguous")
_MOVES += ("alias", "clone", "detach", "movedim", "numpy_T")
_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d", "convolution")
_TRANSPOSED = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")

_LARGEST_PATCHES = 1 << 24
"""Entries of patches that are made at a time."""


class Rows(Protocol):
    """An input → [rows, matrices, columns], one row for every place at which the weight is applied, in parts."""

    def __call__(self, x: Tensor) -> Iterator[Tensor]: ...


@dataclass(frozen=True)
class LastDim:
    """Linear layers: the last dimension, or the one before it, is summed over."""

    dim: int = -1

    def __call__(self, x: Tensor) -> Iterator[Tensor]:
        x = x.movedim(self.dim, -1)
        yield x.reshape(-1, 1, x.shape[-1])


@dataclass(frozen=True)
class Batched:
    """One matrix for every entry of the first dimension."""

    def __call__(self, x: Tensor) -> Iterator[Tensor]:
        yield x.transpose(0, 1)


@dataclass(frozen=True)
class Patches:
    """Convolutions: the patches under the kernel, zeros where it hangs over (im2col, in any number of dimensions).

    A transposed convolution is an ordinary one on an input between whose entries ``spread - 1`` zeros were put.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int
    spread: tuple[int, ...]

    def __call__(self, x: Tensor) -> Iterator[Tensor]:
        if x.dim() == len(self.kernel) + 1:
            x = x.unsqueeze(0)
        each = x[0].numel() * int(np.prod(self.kernel)) * int(np.prod(self.spread)) // int(np.prod(self.stride))
        for images in x.split(max(1, _LARGEST_PATCHES // max(each, 1))):
            yield self._patches(images)

    def _patches(self, x: Tensor) -> Tensor:
        x = F.pad(self._spread(x), [amount for pair in reversed(self.padding) for amount in pair])
        spatial = zip(x.shape[2:], self.kernel, self.stride, self.dilation, strict=True)
        places = [(size - d * (k - 1) - 1) // s + 1 for size, k, s, d in spatial]
        parts = []
        for offsets in itertools.product(*map(range, self.kernel)):
            starts = [o * d for o, d in zip(offsets, self.dilation, strict=True)]
            window = zip(starts, places, self.stride, strict=True)
            parts.append(x[(slice(None), slice(None), *(slice(a, a + (n - 1) * s + 1, s) for a, n, s in window))])
        patches = torch.stack(parts, dim=2).reshape(len(x), self.groups, -1, int(np.prod(places)))
        return patches.permute(0, 3, 1, 2).flatten(0, 1)

    def _spread(self, x: Tensor) -> Tensor:
        for dim, factor in enumerate(self.spread, start=2):
            if factor > 1:
                wide = x.new_zeros([*x.shape[:dim], (x.shape[dim] - 1) * factor + 1, *x.shape[dim + 1 :]])
                wide[(slice(None),) * dim + (slice(None, None, factor),)] = x
                x = wide
        return x


@dataclass(frozen=True)
class Reader:
    """One matrix of a call that reads channels.

    ``entries`` [outputs, columns] int64 are positions in the flattened ``parameter``. ``labels`` [channels] are those
    of the channels, each of which has ``width`` consecutive columns. What it is applied to are the ``rows`` of the
    tensor of ``source``, where this is the ``matrix``-th.
    """

    node: fx.Node
    source: fx.Node
    parameter: str
    entries: Tensor
    labels: Labels
    rows: Rows
    matrix: int = 0

    @property
    def width(self) -> int:
        """Columns of one channel."""
        return self.entries.shape[1] // len(self.labels)

    def columns(self, trace: Trace, units: Sequence[int]) -> tuple[Tensor, ...]:
        """The columns of every unit, int64, none where it isn't read here."""
        channels = trace.units.positions(self.labels, units)
        offsets = np.arange(self.width)
        return tuple(torch.from_numpy((mine[:, None] * self.width + offsets).reshape(-1)) for mine in channels)

    @property
    def weight_key(self) -> tuple[str, int]:
        """What readers have in common that apply the same matrix."""
        return self.parameter, int(self.entries[0, 0])


@dataclass(frozen=True)
class Readers:
    """The readers of a traced module in the order of their calls; ``others`` are calls that read a parameter in a way
    that isn't a product of matrices, with the names of such parameters."""

    trace: Trace
    found: tuple[Reader, ...]
    others: dict[fx.Node, tuple[str, ...]]
    by_node: dict[fx.Node, list[Reader]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        for reader in self.found:
            self.by_node.setdefault(reader.node, []).append(reader)


def find_readers(trace: Trace) -> Readers:
    """All calls of a traced module that sum over channels with a parameter."""
    entries = _entries(trace)
    made = {node: readers for node in trace.calls() if (readers := _read(trace, node, entries)) is not None}
    by_parameter: dict[str, list[Reader]] = {}
    for reader in (r for readers in made.values() for r in readers):
        by_parameter.setdefault(reader.parameter, []).append(reader)
    plain = {name for name, readers in by_parameter.items() if _only_read(name, readers, entries, made)}
    for node, readers in list(made.items()):
        if any(r.parameter not in plain for r in readers):
            del made[node]
    contracting = dict.fromkeys(work.node for work in trace.work if work.node not in made)
    others = {node: names for node in contracting if (names := tuple(_parameters_of(trace, node)))}
    return Readers(trace, tuple(r for readers in made.values() for r in readers), others)


def canonical_names(trace: Trace) -> dict[str, str]:
    """Name of a parameter or buffer → the first name of the same tensor."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(value), name) for name, value in trace.parameters.items()}


def is_rearranged(node: fx.Node) -> bool:
    """Whether a call only moves entries of a parameter, or takes one of several such results."""
    return node.target is operator.getitem or short_name(node) in _MOVES


# -- where entries of parameters go ------------------------------------------------------------------------------------

Moved = dict[fx.Node, "tuple[str, Any]"]
"""Node → (parameter, the positions of its entries in it): a tensor of int64, or several."""


def _entries(trace: Trace) -> Moved:
    """All nodes that hold entries of a parameter and nothing else."""
    names = canonical_names(trace)
    found: Moved = {}
    for node in trace.graph.nodes:
        if node.op == "get_attr":
            tensor = attribute(node.graph.owning_module, str(node.target))
            if isinstance(tensor, nn.Parameter):
                positions = torch.arange(tensor.numel()).reshape(tensor.shape)
                found[node] = (names[str(node.target)], positions)
        elif node.op == "call_function" and len(node.all_input_nodes) == 1 and is_rearranged(node):
            source = node.all_input_nodes[0]
            if source in found:
                name, positions = found[source]
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda _, p=positions: p)
                found[node] = (name, node.target(*args, **kwargs))
    return found


def short_name(node: fx.Node) -> str:
    """``conv2d`` for a call of ATen; empty for any other."""
    schema = getattr(node.target, "_schema", None)
    namespace, _, name = schema.name.partition("::") if schema is not None else ("", "", "")
    return name if namespace == "aten" else ""


def _only_read(name: str, readers: list[Reader], entries: Moved, made: Collection[fx.Node]) -> bool:
    """Whether nothing but readers uses a parameter, and each entry belongs to one matrix, however often applied."""
    if len(readers) > 1 and not _apart(readers):
        return False
    nodes = [n for n, (owner, _) in entries.items() if owner == name]
    uses = [user for node in nodes for user in node.users if user not in entries]
    return all(user in made and _reads_once(user, nodes) for user in uses)


def _apart(readers: list[Reader]) -> bool:
    """Whether matrices that aren't the same have no entry in common."""
    distinct = {r.entries.numpy().tobytes(): r.entries.flatten() for r in readers}
    together = torch.cat(list(distinct.values()))
    taken = torch.zeros(int(together.max()) + 1, dtype=torch.bool)
    taken[together] = True
    return int(taken.sum()) == len(together)


def _reads_once(user: fx.Node, nodes: list[fx.Node]) -> bool:
    """Whether a parameter is the weight of this call and not its input as well."""
    return sum(1 for source in user.all_input_nodes if source in nodes) == 1


def _parameters_of(trace: Trace, node: fx.Node) -> Iterator[str]:
    """Names of the matrices among what a call reads and what follows from parameters alone."""
    names, seen = canonical_names(trace), set()
    todo = list(node.all_input_nodes)
    while todo:
        source = todo.pop(0)
        if source in seen or not _is_parametric(source):
            continue
        seen.add(source)
        todo += source.all_input_nodes
        if source.op == "get_attr" and trace.value(source).shape[1:]:
            yield names[str(source.target)]


def _is_parametric(node: fx.Node) -> bool:
    if node.op == "get_attr":
        return isinstance(attribute(node.graph.owning_module, str(node.target)), nn.Parameter)  # type: ignore[arg-type]
    inputs = node.all_input_nodes
    return node.op == "call_function" and bool(inputs) and all(_is_parametric(n) for n in inputs)


# -- what a call reads -------------------------------------------------------------------------------------------------


def _read(trace: Trace, node: fx.Node, entries: Moved) -> list[Reader] | None:
    """The matrices of a call, none where its weight sums over no channels, or None when it isn't such a call."""
    name = short_name(node)
    if name == "linear":
        return _products(trace, node, entries, weight=node.args[1], source=node.args[0], columns=-1)
    if name in ("matmul", "mm", "bmm", "addmm"):
        first, second = node.args[-2:]
        if second in entries:
            return _products(trace, node, entries, weight=second, source=first, columns=-2)
        if first in entries:
            return _products(trace, node, entries, weight=first, source=second, columns=-1, dim=-2)
    if name in _CONVOLUTIONS + _TRANSPOSED and node.args[1] in entries:
        return _convolution(trace, node, entries, name)
    return None


def _products(
    trace: Trace, node: fx.Node, entries: Moved, *, weight: Any, source: Any, columns: int, dim: int = -1
) -> list[Reader] | None:
    """``columns`` is the dimension of the weight that is summed over, ``dim`` that of the input."""
    if weight not in entries or source in entries:
        return None
    name, positions = entries[weight]
    dims = trace.value(weight).dims
    batched = len(dims) == 3 and dim == -1 and len(trace.value(source).dims) == 3
    if (len(trace.value(source).dims) < 2 and dim == -2) or not (len(dims) == 2 or batched):
        return None
    positions = positions.movedim(columns, -1)
    if not batched:
        return [Reader(node, source, name, positions, dims[columns], LastDim(dim))]
    if trace.value(source).shape[0] != len(positions):
        return None
    return [Reader(node, source, name, one, dims[columns], Batched(), t) for t, one in enumerate(positions)]


def _convolution(trace: Trace, node: fx.Node, entries: Moved, name: str) -> list[Reader]:
    given = {a.name: a.default_value for a in node.target._schema.arguments if a.has_default_value()}  # type: ignore[union-attr]
    given |= named_arguments(node)
    source, weight, groups = given["input"], given["weight"], given["groups"]
    transposed = name in _TRANSPOSED or bool(given.get("transposed"))
    parameter, positions = entries[weight]
    labels = trace.value(weight).dims[0 if transposed else 1]
    # [matrices, outputs, channels, kernel]
    if transposed:
        positions = positions.flip(list(range(2, positions.dim()))).flatten(2)
        positions = positions.unflatten(0, (groups, -1)).transpose(1, 2)
        each = np.split(labels, groups)
    else:
        positions = positions.flatten(2).unflatten(0, (groups, -1))
        each = [labels] * groups
    if positions.shape[2] == 1:
        return []
    rows = _patches(given, trace.value(weight).shape[2:], groups, transposed)
    return [
        Reader(node, source, parameter, one.flatten(1), channels, rows, t)
        for t, (one, channels) in enumerate(zip(positions, each, strict=True))
    ]


def _patches(given: dict[str, Any], kernel: tuple[int, ...], groups: int, transposed: bool) -> Patches:
    stride, dilation = (_per_dim(given[k], len(kernel)) for k in ("stride", "dilation"))
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if isinstance(given["padding"], str):
        same = given["padding"] == "same"
        padding = [(r // 2, r - r // 2) if same else (0, 0) for r in reach]
    else:
        padding = [(p, p) for p in _per_dim(given["padding"], len(kernel))]
    if not transposed:
        return Patches(kernel, stride, tuple(padding), dilation, groups, (1,) * len(kernel))
    more = _per_dim(given["output_padding"], len(kernel))
    padding = [(r - p, r - p + m) for r, (p, _), m in zip(reach, padding, more, strict=True)]
    return Patches(kernel, (1,) * len(kernel), tuple(padding), dilation, groups, stride)


def _per_dim(number: Any, dims: int) -> tuple[int, ...]:
    many = tuple(number) if isinstance(number, list | tuple) else (number,)
    return many * dims if len(many) == 1 else many
