"""New arguments for the operators of a cut graph: sizes, bounds and counts that stood in the call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import fx
from torch._ops import OpOverload

from secateur.structure.kept import Kept
from secateur.structure.trace import Trace, hint
from secateur.structure.units import Labels

Resizer = Callable[["Cut", fx.Node, dict[str, Any]], "OpOverload | None"]
"""Changes the arguments of a call in place; returns the operator that must take its place, if one must."""

RESIZERS: dict[str, Resizer] = {}


class Cut(Kept):
    """What stays of a traced module."""

    def __init__(self, trace: Trace, removed: Iterable[int], grown: Mapping[int, int] | None = None) -> None:
        super().__init__(trace.units, removed, grown)
        self.trace = trace


def resizer(*names: str) -> Callable[[Resizer], Resizer]:
    """Register how the arguments of an operator follow a cut."""

    def register(function: Resizer) -> Resizer:
        RESIZERS.update(dict.fromkeys(names, function))
        return function

    return register


def resized(cut: Cut, node: fx.Node) -> tuple[Any, dict[str, Any]] | None:
    """(operator, all arguments by name) of a call whose arguments change with the cut, or None. Raises Unfit.

    Nodes stay nodes; a tensor among the arguments is a new constant.
    """
    schema = node.target._schema  # type: ignore[union-attr]
    change = RESIZERS.get(schema.name)
    if change is None:
        return None
    arguments = named_arguments(node)
    target = change(cut, node, arguments)
    return target or node.target, arguments


def named_arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments that a call gives, by the names of the operator's schema."""
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def _numbers(cut: Cut, node: fx.Node, old: list[Any]) -> list[Any]:
    """The shape of the output; sizes that are dynamic stay as they are computed, or are -1 when they came from it.

    A computed size that the cut changes becomes -1, of which there can be one.
    """
    shape = cut.shape(cut.trace.value(node))
    found = [_size_of(o, n) for o, n in zip(old, shape[len(shape) - len(old) :], strict=True)]
    # an expansion may have several, of dimensions that stay as they are
    if found.count(-1) > max(1, old.count(-1)):
        raise Unfit("more than one of its sizes is computed from what is cut")
    return found


def _size_of(old: Any, new: int) -> Any:
    if isinstance(old, fx.Node):
        return old if hint(old.meta.get("val")) == new else -1
    return -1 if old == -1 else new


def _is_free(sizes: Any) -> bool:
    """Whether some of the sizes of a call are computed while the network runs."""
    return any(isinstance(one, fx.Node) for one in (sizes if isinstance(sizes, list | tuple) else [sizes]))


@resizer(
    "aten::view",
    "aten::reshape",
    "aten::_unsafe_view",
    "aten::expand",
    "aten::new_zeros",
    "aten::new_ones",
    "aten::new_full",
    "aten::new_empty",
    "aten::zeros",
    "aten::ones",
    "aten::full",
    "aten::empty",
    "aten::_reshape_alias",
    "aten::view_copy",
    "aten::broadcast_to",
)
def _size(cut: Cut, node: fx.Node, arguments: dict[str, Any]) -> None:
    name = "shape" if "shape" in arguments else "size"
    arguments[name] = _numbers(cut, node, list(arguments[name]))


@resizer("aten::slice", "aten::slice_scatter")
def _bounds(cut: Cut, node: fx.Node, arguments: dict[str, Any]) -> OpOverload | None:
    dim = arguments.get("dim", 0)
    labels = cut.trace.value(node.args[0]).dims[dim]  # type: ignore[arg-type]
    if cut.unchanged(labels):
        return None
    start, end, step = (arguments.get(n) for n in ("start", "end", "step"))
    if _is_free([start, end]):
        raise Unfit("its bounds are computed while the network runs")
    chosen = range(len(labels))[slice(hint(start), hint(end), step)]
    if (step or 1) != 1:
        if "src" in arguments:
            raise Unfit(f"it writes every {step}. position")
        # every n-th position of fewer is another pattern
        index = _renumbered(cut, labels, torch.tensor(chosen))
        arguments.clear()
        arguments |= {"self": node.args[0], "dim": dim, "index": index}
        return torch.ops.aten.index_select.default
    arguments["start"] = cut.renumber(labels, chosen.start)
    arguments["end"] = cut.renumber(labels, max(chosen.stop, chosen.start))
    return None


def _renumbered(cut: Cut, labels: Labels, index: torch.Tensor) -> torch.Tensor:
    """A constant index into a dimension, without what leaves and by the new numbers."""
    times = torch.from_numpy(cut.times(labels))
    index = index.long()
    copies = times[index]
    first = (times.cumsum(0) - times)[index].repeat_interleave(copies)
    copy = torch.arange(len(first)) - (copies.cumsum(0) - copies).repeat_interleave(copies)
    # counted from the end where it was, as the edited module does
    return first + copy - torch.where(index < 0, times.sum(), 0).repeat_interleave(copies)


@resizer("aten::index_select")
def _index_select(cut: Cut, node: fx.Node, arguments: dict[str, Any]) -> None:
    labels = cut.trace.value(node.args[0]).dims[arguments["dim"]]  # type: ignore[arg-type]
    index = cut.trace.constant(arguments["index"])
    if index is not None and not cut.unchanged(labels):
        arguments["index"] = _renumbered(cut, labels, index)


@resizer("aten::index", "aten::_unsafe_index")
def _index(cut: Cut, node: fx.Node, arguments: dict[str, Any]) -> None:
    indices = list(arguments["indices"])
    for dim, one in enumerate(indices):
        labels = cut.trace.value(node.args[0]).dims[dim]  # type: ignore[arg-type]
        if one is not None and not cut.unchanged(labels):
            index = cut.trace.constant(one)
            assert index is not None, "a computed index keeps the dimension"
            indices[dim] = _renumbered(cut, labels, index)
    arguments["indices"] = indices


@resizer("aten::split", "aten::unsafe_split", "aten::chunk", "aten::unsafe_chunk", "aten::tensor_split")
def _by_sizes(cut: Cut, node: fx.Node, arguments: dict[str, Any]) -> OpOverload | None:
    dim = arguments.get("dim", 0)
    labels = cut.trace.value(node.args[0]).dims[dim]  # type: ignore[arg-type]
    if cut.unchanged(labels):
        return None
    arguments.clear()
    sizes = [cut.size(v.dims[dim]) for v in cut.trace.values[node]]  # type: ignore[union-attr]
    arguments |= {"self": node.args[0], "split_sizes": sizes, "dim": dim}
    return torch.ops.aten.split_with_sizes.default


class Unfit(Exception):
    """A call can't be written for the cut sizes."""


@resizer("aten::narrow")
def _narrow(cut: Cut, node: fx.Node, arguments: dict[str, Any]) -> None:
    labels = cut.trace.value(node.args[0]).dims[arguments["dim"]]  # type: ignore[arg-type]
    start, length = arguments["start"], arguments["length"]
    if cut.unchanged(labels):
        return
    if _is_free([start, length]):
        raise Unfit("its bounds are computed while the network runs")
    arguments["start"] = cut.renumber(labels, start)
    arguments["length"] = cut.renumber(labels, start + length) - arguments["start"]


@resizer("aten::split_with_sizes", "aten::split_with_sizes_copy")
def _parts(cut: Cut, node: fx.Node, arguments: dict[str, Any]) -> None:
    dim = arguments.get("dim", 0)
    labels = cut.trace.value(node.args[0]).dims[dim]  # type: ignore[arg-type]
    if cut.unchanged(labels):
        return
    if _is_free(arguments["split_sizes"]):
        raise Unfit("its sizes are computed while the network runs")
    arguments["split_sizes"] = [cut.size(v.dims[dim]) for v in cut.trace.values[node]]  # type: ignore[union-attr]


@resizer("aten::constant_pad_nd", "aten::pad")
def _pad(cut: Cut, node: fx.Node, arguments: dict[str, Any]) -> None:
    x = cut.trace.value(node.args[0])  # type: ignore[arg-type]
    amounts = list(arguments["pad"])
    for back in range(len(amounts) // 2):
        labels = x.dims[len(x.dims) - 1 - back]
        for side, lost in ((0, slice(None, None)), (1, slice(None, None, -1))):
            amount = amounts[2 * back + side]
            if amount < 0:
                amounts[2 * back + side] = -int(cut.times(labels)[lost][:-amount].sum())
    arguments["pad"] = amounts


@resizer("aten::conv1d", "aten::conv2d", "aten::conv3d", "aten::convolution")
@resizer("aten::conv_transpose1d", "aten::conv_transpose2d", "aten::conv_transpose3d")
def _groups(cut: Cut, node: fx.Node, arguments: dict[str, Any]) -> None:
    groups = arguments.get("groups", 1)
    if groups == 1:
        return
    weight = cut.trace.value(node.args[1])  # type: ignore[arg-type]
    x = cut.trace.value(node.args[0])  # type: ignore[arg-type]
    transposed = arguments.get("transposed") or "conv_transpose" in node.target._schema.name  # type: ignore[union-attr]
    spatial = len(weight.dims) - 2
    channels = cut.size(x.dims[-spatial - 1])
    if transposed:
        arguments["groups"] = _blocks(cut, weight.dims[0], groups)
    else:
        arguments["groups"] = channels // cut.size(weight.dims[1])


@resizer("aten::group_norm", "aten::native_group_norm")
def _group_norm(cut: Cut, node: fx.Node, arguments: dict[str, Any]) -> None:
    channels = cut.trace.value(node.args[0]).dims[1]  # type: ignore[arg-type]
    name = "num_groups" if "num_groups" in arguments else "group"
    arguments[name] = _blocks(cut, channels, arguments[name])
    if "C" in arguments:
        arguments["C"] = cut.size(channels)


@resizer("aten::instance_norm")
def _any_channels(cut: Cut, node: fx.Node, arguments: dict[str, Any]) -> None:
    """The call follows its input; a module without parameters states the channels all the same, and warns of others."""


@resizer("aten::layer_norm", "aten::native_layer_norm", "aten::rms_norm", "aten::_fused_rms_norm")
def _normalized(cut: Cut, node: fx.Node, arguments: dict[str, Any]) -> None:
    dims = cut.trace.value(node.args[0]).dims  # type: ignore[arg-type]
    count = len(arguments["normalized_shape"])
    arguments["normalized_shape"] = [cut.size(labels) for labels in dims[-count:]]


@resizer("aten::scaled_dot_product_attention")
def _scale(cut: Cut, node: fx.Node, arguments: dict[str, Any]) -> None:
    """Scores were divided by the root of the old head size, which fewer lanes must not change."""
    lanes = cut.trace.value(node.args[0]).dims[-1]  # type: ignore[arg-type]
    if arguments.get("scale") is None and not cut.unchanged(lanes):
        arguments["scale"] = len(lanes) ** -0.5


@resizer("aten::repeat", "aten::tile")
def _times(cut: Cut, node: fx.Node, arguments: dict[str, Any]) -> None:
    x, out = cut.trace.value(node.args[0]), cut.trace.value(node)  # type: ignore[arg-type]
    name = "repeats" if "repeats" in arguments else "dims"
    extra = len(out.dims) - len(x.dims)
    times = [
        cut.size(labels) // (cut.size(x.dims[d - extra]) if d >= extra else 1) for d, labels in enumerate(out.dims)
    ]
    # tile may name the last dimensions only
    old = arguments[name]
    new = times[len(times) - len(old) :]
    arguments[name] = [o if isinstance(o, fx.Node) else n for o, n in zip(old, new, strict=True)]


@resizer("aten::unflatten")
def _unflatten(cut: Cut, node: fx.Node, arguments: dict[str, Any]) -> None:
    out = cut.trace.value(node)
    count = len(arguments["sizes"])
    dim = arguments["dim"] % (len(out.dims) - count + 1)
    sizes = [cut.size(labels) for labels in out.dims[dim : dim + count]]
    arguments["sizes"] = [_size_of(o, n) for o, n in zip(arguments["sizes"], sizes, strict=True)]


@resizer("aten::channel_shuffle", "aten::native_channel_shuffle")
def _shuffle_groups(cut: Cut, node: fx.Node, arguments: dict[str, Any]) -> None:
    channels = cut.trace.value(node.args[0]).dims[1]  # type: ignore[arg-type]
    arguments["groups"] = _blocks(cut, channels, arguments["groups"])


def _blocks(cut: Cut, labels: Labels, groups: int) -> int:
    """How many equal blocks of channels there are: fewer when whole ones have left, more when they are there again.

    Where all have grown alike, their channels have, since a block that grows as a whole has copies beside it.
    """
    sizes = cut.times(labels).reshape(groups, -1).sum(axis=1)
    sizes = sizes[sizes > 0]
    return len(sizes) if (sizes == sizes[:1]).all() else int(sizes.sum() // np.gcd.reduce(sizes))
