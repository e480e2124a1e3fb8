"""Latency as a budget: how long every call of a network takes at a few widths, measured here, and what lies between.

    t(network) = scale * sum over its calls of t_call(width of its inputs, width of its outputs) + rest

A call (a convolution, a norm, an addition) is timed alone on random tensors, at eight widths of each of its dimensions
that can shrink, all combined; calls of the same sizes share an entry. Between the measured widths t_call is
interpolated linearly. Kernels like multiples of 8, 16 or 32 channels, and a layer can be slower than a wider one: the
widths are multiples of ``round_to``, so that with one that the machine likes what lies in between doesn't matter. A
call takes longer or shorter among others than alone (caches, memory that must be found), and the interpreter takes time
between them: scale and rest are such that the sum is right for the whole network and for one that is narrow everywhere,
both of which are measured.

Source: T.-J. Yang et al., "NetAdapt: Platform-Aware Neural Network Adaptation for Mobile Applications", ECCV 2018,
arXiv:1804.03230, for tables of layers that add up; M. Shen et al., "HALP: Hardware-Aware Latency Pruning", 2021,
arXiv:2110.10811, for latency by the widths of input and output as the budget of global pruning.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import nn

from secateur.errors import PlanError, UnsupportedModelError
from secateur.latencytable import Entry, LatencyTable
from secateur.networks.timedcalls import LEVELS, TimedCall, kept_units, milliseconds, time_call, timed_calls
from secateur.structure.exporting import evaluation_mode
from secateur.structure.graphcut import cut_graph
from secateur.structure.groups import TracedAnatomy
from secateur.structure.kept import Kept
from secateur.structure.resize import Cut
from secateur.structure.trace import Trace

Progress = Callable[[str, int, int], None]


class Latencies:
    """Milliseconds of one call of a network, whole or without some of its units."""

    def __init__(
        self, anatomy: TracedAnatomy, calls: Sequence[TimedCall], table: LatencyTable, whole: str, narrow: set[int]
    ) -> None:
        self._units = anatomy.trace.units
        self._calls = [(call.widths, table.entries[call.key]) for call in calls]
        self.table = table
        times = table.entries[whole].milliseconds
        self.measured = float(times[-1])
        dense, least = self._alone(()), self._alone(narrow)
        self._scale = self.measured / dense if dense else 1.0
        if len(times) > 1 and dense > least and times[-1] > times[0]:
            # a line through both, which doesn't go below zero
            self._scale = min(self._scale, float(times[-1] - times[0]) / (dense - least))
        self._rest = self.measured - self._scale * dense

    def without(self, removed: Iterable[int]) -> float:
        """What a call is expected to take when these units have left, in milliseconds."""
        return self._rest + self._scale * self._alone(removed)

    def _alone(self, removed: Iterable[int]) -> float:
        kept = Kept(self._units, removed)
        return sum(entry.at([kept.size(w.labels) / len(w.labels) for w in widths]) for widths, entry in self._calls)

    def note(self, removed: Iterable[int]) -> str:
        """What was measured, where, and what is expected of the cut network."""
        return (
            f"latency: {self.measured:.3g} ms measured, {self.without(removed):.3g} ms expected, from"
            f" {len({id(entry) for _, entry in self._calls})} kinds of calls timed alone; {self.table.about}"
        )


def measure_latencies(
    anatomy: TracedAnatomy,
    module: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    table: LatencyTable,
    step: int = 1,
    progress: Progress = lambda stage, done, total: None,
) -> Latencies:
    """Time whatever ``table`` doesn't hold yet, and keep it there. Raises UsageError for a table of another machine."""
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    calls = timed_calls(anatomy, step, device)
    whole = _whole_key(module, calls)
    missing = {call.key: call for call in calls if call.key not in table.entries}
    total = len(missing) + (whole not in table.entries)
    table.check_machine(total)
    narrow = narrowed(anatomy, step)
    with torch.no_grad():
        if whole not in table.entries:
            # first, since it brings allocator and libraries into the state in which the network runs
            table.entries[whole] = _time_whole(anatomy.trace, module, args, kwargs, narrow, device)
        for done, (key, call) in enumerate(missing.items(), start=total - len(missing) + 1):
            table.entries[key] = time_call(anatomy.trace, call, step, device)
            progress("latency", done, total)
    if total:
        table.save()
    return Latencies(anatomy, calls, table, whole, narrow)


def narrowed(anatomy: TracedAnatomy, step: int) -> set[int]:
    """Units that leave for every group to be as narrow as calls are timed."""
    free = (tuple(units) for name, units in anatomy.ids.items() if anatomy[name].frozen is None)
    return {unit for units in free for unit in units[kept_units(LEVELS[0], len(units), step) :]}


def _time_whole(
    trace: Trace,
    module: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    narrow: set[int],
    device: torch.device,
) -> Entry:
    """Time the network as it is and, where it can be cut that far, narrow."""
    works = {"1": lambda: module(*args, **kwargs)}
    with suppress(PlanError, UnsupportedModelError):
        graph = cut_graph(Cut(trace, narrow))
        works = {str(LEVELS[0]): lambda: graph(*args, **kwargs), **works}
    with evaluation_mode(module):
        taken = milliseconds(works, device, "run the network on its example inputs")
    return Entry((np.array([float(name) for name in works]),), np.array(taken))


def _whole_key(module: nn.Module, calls: Sequence[TimedCall]) -> str:
    digest = hashlib.sha256("\n".join(call.key for call in calls).encode()).hexdigest()
    return f"whole {type(module).__name__} {digest[:16]}"
