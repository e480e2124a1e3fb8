"""Groups of a traced network: units that visit the same dimensions of the same tensors, named by who makes them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch

from secateur.errors import UsageError
from secateur.structure.anatomy import Anatomy, Frozen, Group, Slices
from secateur.structure.costs import Costs
from secateur.structure.silence import heard
from secateur.structure.traced import Traced

HEADS = ("outer", "inner", "both")


@dataclass(frozen=True)
class TracedAnatomy(Anatomy):
    """An anatomy with the trace it came from, of its front end's own type. ``ids`` are the units' representatives, by
    group."""

    trace: Any
    ids: Mapping[str, tuple[int, ...]]
    costs: Costs

    def units_removed(self, removed: Mapping[str, torch.Tensor]) -> set[int]:
        """Representatives of the units that leave."""
        return {self.ids[name][int(u)] for name, units in removed.items() for u in units}

    def units_grown(self, keep: Mapping[str, torch.Tensor]) -> dict[int, int]:
        """Representatives of the units that are kept more than once, and how often."""
        found = {}
        for name, kept in keep.items():
            units, times = kept.unique(return_counts=True)
            several = times > 1
            found |= {
                self.ids[name][u]: n for u, n in zip(units[several].tolist(), times[several].tolist(), strict=True)
            }
        return found


def traced_anatomy(
    trace: Traced, *, heads: str = "outer", ignore: Iterable[str] = (), model_type: str | None = None
) -> TracedAnatomy:
    """Everything that can be cut in a traced network.

    ``heads`` is what leaves where a dimension is made of heads and lanes: whole heads (``outer``), the same lane of
    every head (``inner``), or ``both``. ``ignore`` are patterns of module or parameter names that stay as they are.
    Raises UsageError.
    """
    if heads not in HEADS:
        raise UsageError(f"heads must be one of {', '.join(HEADS)}, got {heads!r}")
    _pin_ignored(trace, tuple(ignore))
    costs = Costs(trace)
    total = costs.without(())
    found = _grouped(trace)
    single = costs.of([members[0] for members in found.values()])
    kept_by_policy, inexact = _policy(trace, heads), _inexact(trace)
    groups = [
        Group(
            name=name,
            kind="channel",
            layer=0,
            units=len(members),
            cost=cost,
            slices=slices,
            frozen=next((kept_by_policy[u] for u in members if u in kept_by_policy), None),
            inexact=next((inexact[u] for u in members if u in inexact), None),
        )
        for (name, members), cost, slices in zip(found.items(), single, _slices(trace, found), strict=True)
    ]
    return TracedAnatomy(
        model_type=model_type or trace.title,
        num_layers=0,
        groups=tuple(groups),
        matrices=(),
        frozen=tuple(_frozen(trace)),
        blocks=total,
        total=total,
        trace=trace,
        ids={name: tuple(members) for name, members in found.items()},
        costs=costs,
    )


def _pin_ignored(trace: Traced, patterns: Sequence[str]) -> None:
    for pattern in patterns:
        found = [n for n in trace.parameters if matches(n, pattern)]
        if not found:
            raise UsageError(f"ignore={pattern!r} matches no parameter of {trace.title}")
        for name in found:
            for labels in trace.parameters[name].dims:
                trace.units.pin(labels, f"ignored by {pattern!r}")


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern names this parameter, module or group, or what is above it."""
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def _grouped(trace: Traced) -> dict[str, list[int]]:
    """Units by name of their group. The units of a group have as many positions in the same dimensions."""
    places = [labels for dims in trace.distinct_parameters().values() for labels in dims]
    signature = np.zeros(len(trace.units.flags(())), dtype=np.uint64)
    first: dict[int, tuple[int, int]] = {}
    for number, labels in enumerate(places, start=1):
        table = trace.units.table(labels)
        units, at, counts = np.unique(table.reshape(-1), return_index=True, return_counts=True)
        signature[units] = (
            signature[units] * np.uint64(6364136223846793005)
            # wraps around like the product above, which numpy only does silently for arrays
            + np.uint64(number * 1442695040888963407 % (1 << 64))
            + counts.astype(np.uint64)
        )
        for unit, position in zip(units.tolist(), (at // table.shape[1]).tolist(), strict=True):
            first.setdefault(unit, (number, position))
    first.pop(-1, None)
    # as many heads as each has lanes: they visit the same places, and are of two kinds all the same
    signature[np.array(sorted(_lanes(trace)), dtype=np.int64)] += np.uint64(0x9E3779B97F4A7C15)
    by_signature: dict[int, list[int]] = {}
    for unit in sorted(first, key=first.__getitem__):
        by_signature.setdefault(int(signature[unit]), []).append(unit)
    return _named(trace, list(by_signature.values()))


def _named(trace: Traced, groups: list[list[int]]) -> dict[str, list[int]]:
    """Named by the first parameter that makes them, as a rule the one along whose first dimension they lie."""
    makers: dict[int, str] = {}
    others: dict[int, str] = {}
    for name, dims in trace.distinct_parameters().items():
        base, made = trace.maker(name)
        for dim, labels in enumerate(dims):
            into = makers if dim == made else others
            for unit in np.unique(trace.units.table(labels)).tolist():
                into.setdefault(unit, base)
    named: dict[str, list[int]] = {}
    for members in groups:
        base = makers.get(members[0]) or others[members[0]]
        name, number = base, 2
        while name in named:
            name, number = f"{base}#{number}", number + 1
        named[name] = members
    return named


def _slices(trace: Traced, groups: Mapping[str, list[int]]) -> list[tuple[Slices, ...]]:
    """For every group, in order, the positions of its units in every dimension that they visit."""
    size = len(trace.units.flags(()))
    group_of, rank = np.full(size, -1), np.zeros(size, dtype=np.int64)
    for number, members in enumerate(groups.values()):
        group_of[members], rank[members] = number, np.arange(len(members))
    found: list[list[Slices]] = [[] for _ in groups]
    sizes = [len(members) for members in groups.values()]
    for name, dims in trace.distinct_parameters().items():
        for dim, labels in enumerate(dims):
            table = trace.units.table(labels)
            units, where = table.reshape(-1), np.repeat(np.arange(len(table)), table.shape[1])
            where, units = where[units >= 0], units[units >= 0]
            order = np.lexsort((where, rank[units], group_of[units]))
            where, owner = where[order], group_of[units][order]
            for number in np.unique(owner).tolist():
                index = torch.from_numpy(where[owner == number].reshape(sizes[number], -1))
                found[number].append(Slices(name, dim, index))
    return [tuple(parts) for parts in found]


def _lanes(trace: Traced) -> set[int]:
    """Units that are the same position in every head."""
    return {u for labels in trace.lanes for u in np.unique(trace.units.table(labels)).tolist() if u >= 0}


def _policy(trace: Traced, heads: str) -> dict[int, str]:
    """Units that stay because of ``heads``, and why."""
    units = trace.units
    lanes = _lanes(trace)
    stays: dict[int, str] = {}
    if heads == "both":
        return stays
    what = "lanes" if heads == "outer" else "whole heads"
    for dims in trace.distinct_parameters().values():
        for labels in dims:
            table = units.table(labels)
            for row in np.unique(table, axis=0).tolist() if table.shape[1] > 1 else ():
                found = {u for u in row if u >= 0}
                if found & lanes and found - lanes:
                    chosen = found & lanes if heads == "outer" else found - lanes
                    stays |= dict.fromkeys(chosen, f"{what} of attention stay with heads={heads!r}")
    return stays


def _inexact(trace: Traced) -> dict[int, str]:
    """Units of which a masked network keeps something, and what."""
    found: dict[int, str] = {}
    for labels, why in trace.inexact:
        for unit in np.unique(trace.units.table(labels)).tolist():
            found.setdefault(unit, why)
    return {**heard(trace), **found}


def _frozen(trace: Traced) -> list[Frozen]:
    """Dimensions of parameters of which nothing can leave."""
    found = []
    for name, dims in trace.distinct_parameters().items():
        for dim, labels in enumerate(dims):
            roots = np.unique(trace.units.roots(labels)).tolist()
            reason = trace.units.reason(roots[0]) if roots else None
            if reason and len(labels) > 1 and (trace.units.table(labels) < 0).all():
                found.append(Frozen(f"{name} dim {dim}", reason))
    return found
