"""Timing one call of a traced module by itself, at several widths of what it reads and makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from secateur import timing
from secateur.errors import UnsupportedModelError, first_line
from secateur.latencytable import Entry
from secateur.structure.groups import TracedAnatomy
from secateur.structure.kept import Kept
from secateur.structure.resize import Cut, Unfit, named_arguments, resized
from secateur.structure.trace import Trace, Value, describe
from secateur.structure.units import Labels

LEVELS = tuple(part / 8 for part in range(1, 9))
"""Shares of the units of a dimension that are kept when a call is timed."""
LETTERS = "ab"
MOST_DIMS = len(LETTERS)
"""Dimensions that shrink by themselves; where a call has more of them they shrink together."""
REPEATS = 5


@dataclass(frozen=True)
class Width:
    """A dimension of a call that can shrink: its positions, and the units that can leave it, by group."""

    labels: Labels
    groups: tuple[tuple[int, ...], ...]

    def removed(self, share: float, step: int) -> set[int]:
        """Units that leave for about ``share`` of every group to stay, as many as a multiple of ``step``."""
        return {u for units in self.groups for u in units[kept_units(share, len(units), step) :]}


@dataclass(frozen=True)
class TimedCall:
    """A call of the graph, the dimensions along which it shrinks, and its name in a table."""

    node: fx.Node
    widths: tuple[Width, ...]
    key: str


def kept_units(share: float, units: int, step: int) -> int:
    """How many of some units stay for about this share: all, or a multiple of ``step``."""
    return units if share == 1 else max(1, round(share * units / step)) * step


def timed_calls(anatomy: TracedAnatomy, step: int, device: torch.device) -> list[TimedCall]:
    """The calls of a traced module that compute something, views and lookups left out."""
    free = {u: name for name, units in anatomy.ids.items() if anatomy[name].frozen is None for u in units}
    groups = {name: tuple(units) for name, units in anatomy.ids.items()}
    found = []
    for node in anatomy.trace.calls():
        if _computes(node):
            widths = _widths(anatomy.trace, node, free, groups)
            found.append(TimedCall(node, widths, _key(anatomy.trace, node, widths) + _place(widths, step, device)))
    return found


def _place(widths: Sequence[Width], step: int, device: torch.device) -> str:
    """`` on cpu; a 58, b 29+28+1 by 8``: where a call is timed, how many units its dimensions are made of, the step."""
    sums = ["+".join(str(len(units)) for units in width.groups) for width in widths]
    made_of = ", ".join(f"{letter} {units}" for letter, units in zip(LETTERS, sums, strict=False))
    return f" on {device.type}" + (f"; {made_of} by {step}" if made_of else "")


def _computes(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    if schema is None or not isinstance(node.meta.get("val"), Tensor | list | tuple):
        return False
    return not any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)


def _values(trace: Trace, node: fx.Node) -> list[Value]:
    """The tensors that a call reads and makes."""
    found = [trace.values.get(n) for n in (*node.all_input_nodes, node)]
    return [v for one in found if one is not None for v in (one if isinstance(one, list) else [one])]


def _widths(
    trace: Trace, node: fx.Node, free: Mapping[int, str], groups: Mapping[str, tuple[int, ...]]
) -> tuple[Width, ...]:
    """The dimensions of a call along which groups can leave; those that share a group are one."""
    merged: list[tuple[Labels, set[str]]] = []
    for labels in (labels for value in _values(trace, node) for labels in value.dims):
        names = {free[u] for u in np.unique(trace.units.table(labels)).tolist() if u in free}
        if not names:
            continue
        shared = [one for one in merged if one[1] & names]
        merged = [one for one in merged if not one[1] & names]
        longest = max([labels, *(one[0] for one in shared)], key=len)
        merged.append((longest, names.union(*(one[1] for one in shared))))
    if len(merged) > MOST_DIMS:
        merged = [(max((one[0] for one in merged), key=len), set().union(*(one[1] for one in merged)))]
    return tuple(Width(labels, tuple(groups[name] for name in sorted(names))) for labels, names in merged)


def _key(trace: Trace, node: fx.Node, widths: Sequence[Width]) -> str:
    """``aten.conv2d.default(float32[8, 64a, 56, 56], …)``: everything that the time of a call depends on."""
    units = [{u for group in width.groups for u in group} for width in widths]

    def shown(value: Any) -> str:
        if isinstance(value, fx.Node):
            example, place = value.meta.get("val"), trace.values.get(value)
            if isinstance(example, Tensor) and isinstance(place, Value):
                order = "" if example.is_contiguous() else f"{tuple(example.stride())}"
                kind = str(example.dtype).removeprefix("torch.")
                return f"{kind}[{', '.join(map(size, place.dims))}]{order}"
            return "node"
        if isinstance(value, list | tuple):
            return f"[{', '.join(map(shown, value))}]"
        return str(value)

    def size(labels: Labels) -> str:
        here = set(np.unique(trace.units.table(labels)).tolist())
        return f"{len(labels)}{''.join(LETTERS[i] for i, some in enumerate(units) if some & here)}"

    arguments = ", ".join(f"{name}={shown(value)}" for name, value in named_arguments(node).items())
    return f"{node.target}({arguments})"


def time_call(trace: Trace, call: TimedCall, step: int, device: torch.device) -> Entry:
    """Time one call at all combinations of widths. Raises UnsupportedModelError when it doesn't run alone."""
    shares: list[dict[float, set[int]]] = []
    for width in call.widths:
        by_share: dict[float, set[int]] = {}
        for level in LEVELS:
            removed = width.removed(level, step)
            by_share.setdefault(Kept(trace.units, removed).size(width.labels) / len(width.labels), removed)
        shares.append(dict(sorted(by_share.items())))
    times = np.zeros([len(one) for one in shares])
    for point in np.ndindex(times.shape):
        gone = [list(one.values())[at] for one, at in zip(shares, point, strict=True)]
        work = _work(trace, call.node, set().union(*gone), device)
        (times[point],) = milliseconds({"": work}, device, f"time {describe(call.node)} alone")
    return Entry(tuple(np.array(list(one)) for one in shares), times)


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


def milliseconds(works: Mapping[str, Callable[[], object]], device: torch.device, what: str) -> list[float]:
    """The fastest of the repeats of each work: what slows one down isn't the network's. ``what`` is for messages."""
    try:
        taken = timing.take_turns(works, REPEATS, dict.fromkeys(works, device))
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise UnsupportedModelError(f"can't {what}: {first_line(error)}") from None
    return [1000 * min(taken[name]) for name in works]
