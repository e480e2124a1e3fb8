"""Latency as a budget: how long every call of a network takes at a few widths, measured here, and what lies between.

    t(network) = scale * sum over its calls of t_call(width of its inputs, width of its outputs) + rest

A call (a convolution, a norm, an addition) is timed alone on random tensors, at eight widths of each of its dimensions
that can shrink, all combined; calls of the same sizes share an entry. Between the measured widths t_call is
interpolated linearly. Kernels like multiples of 8, 16 or 32 channels, and a layer can be slower than a wider one: the
widths are multiples of ``round_to``, so that with one that the machine likes what lies in between doesn't matter. A
call takes longer or shorter among others than alone (caches, memory that must be found), and the interpreter takes time
between them: scale and rest are such that the sum is right for the whole network and for one that is narrow everywhere,
both of which are measured.

How a call runs alone is the front end's: a torch call on tensors of its own, a call of an ONNX model as a model of one
node in onnxruntime. What a runtime fuses when it has the whole network (a norm into the convolution before it) is timed
apart here, and the scale makes up for it.

Source: T.-J. Yang et al., "NetAdapt: Platform-Aware Neural Network Adaptation for Mobile Applications", ECCV 2018,
arXiv:1804.03230, for tables of layers that add up; M. Shen et al., "HALP: Hardware-Aware Latency Pruning", 2021,
arXiv:2110.10811, for latency by the widths of input and output as the budget of global pruning.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from typing import Protocol

import numpy as np
import torch

from secateur import timing
from secateur.errors import PlanError, SecateurError, UnsupportedModelError, first_line
from secateur.latencytable import Entry, LatencyTable
from secateur.networks.widths import LEVELS, TimedCall, narrowed
from secateur.structure.groups import TracedAnatomy
from secateur.structure.kept import Kept
from secateur.structure.units import Units

Progress = Callable[[str, int, int], None]

REPEATS = 5


class Calls(Protocol):
    """The calls of a network that take time, and how its front end runs them; ``title`` is what tables call it."""

    @property
    def title(self) -> str: ...

    @property
    def device(self) -> torch.device: ...

    def about(self, table: LatencyTable) -> str:
        """Where the times of a table were taken, for people."""
        ...

    def found(self, step: int) -> list[TimedCall]:
        """The calls that are timed alone, at widths in steps of so many units."""
        ...

    def signature(self, calls: Sequence[TimedCall], step: int) -> list[str]:
        """Everything that the time of the whole network depends on; ``calls`` are those found."""
        ...

    def describe(self, call: TimedCall) -> str:
        """For messages."""
        ...

    def ready(self, table: LatencyTable) -> AbstractContextManager[None]:
        """What it takes to run; times are only taken within. Raises MissingExtraError."""
        ...

    def alone(self, call: TimedCall, removed: set[int]) -> Callable[[], object]:
        """One call on random tensors, without these units. Raises UnsupportedModelError."""
        ...

    def whole(self, removed: set[int]) -> Callable[[], object]:
        """The network without these units on its example inputs. Raises PlanError or UnsupportedModelError."""
        ...


class Latencies:
    """Milliseconds of one call of a network, whole or without some of its units."""

    def __init__(
        self,
        anatomy: TracedAnatomy,
        calls: Sequence[TimedCall],
        table: LatencyTable,
        whole: str,
        narrow: set[int],
        about: str,
    ) -> None:
        self._units = anatomy.trace.units
        self._calls = [(call.widths, table.entries[call.key]) for call in calls]
        self.about = about
        times = table.entries[whole].milliseconds
        self.measured = float(times[-1])
        dense, least = self._alone(()), self._alone(narrow)
        self._scale = self.measured / dense if dense else 1.0
        if len(times) > 1 and dense > least and times[-1] > times[0]:
            # a line through both; the rest is negative where calls that run alone take time of their own to be called
            self._scale = float(times[-1] - times[0]) / (dense - least)
        self._rest = self.measured - self._scale * dense

    def without(self, removed: Iterable[int]) -> float:
        """What a call is expected to take when these units have left, in milliseconds."""
        return max(self._rest + self._scale * self._alone(removed), 0.0)

    def _alone(self, removed: Iterable[int]) -> float:
        kept = Kept(self._units, removed)
        return sum(entry.at([kept.size(w.labels) / len(w.labels) for w in widths]) for widths, entry in self._calls)

    def note(self, removed: Iterable[int]) -> str:
        """What was measured, where, and what is expected of the cut network."""
        return (
            f"latency: {self.measured:.3g} ms measured, {self.without(removed):.3g} ms expected, from"
            f" {len({id(entry) for _, entry in self._calls})} kinds of calls timed alone; {self.about}"
        )


def measure_latencies(
    anatomy: TracedAnatomy,
    front: Calls,
    table: LatencyTable,
    step: int = 1,
    progress: Progress = lambda stage, done, total: None,
) -> Latencies:
    """Time whatever ``table`` doesn't hold yet, and keep it there.

    Raises UsageError for a table of another machine, UnsupportedModelError for what doesn't run, MissingExtraError.
    """
    calls = front.found(step)
    whole = f"whole {front.title} {_digest(front.signature(calls, step))}"
    missing = {call.key: call for call in calls if call.key not in table.entries}
    total = len(missing) + (whole not in table.entries)
    table.check_machine(total)
    narrow = narrowed(anatomy, step)
    if total:
        with front.ready(table):
            if whole not in table.entries:
                # first, since it brings allocator and libraries into the state in which the network runs
                table.entries[whole] = _time_whole(front, narrow)
            for done, (key, call) in enumerate(missing.items(), start=total - len(missing) + 1):
                table.entries[key] = _time_call(front, anatomy.trace.units, call, step)
                progress("latency", done, total)
        table.save()
    return Latencies(anatomy, calls, table, whole, narrow, front.about(table))


def _digest(signature: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(signature).encode()).hexdigest()[:16]


def _time_whole(front: Calls, narrow: set[int]) -> Entry:
    """Time the network as it is and, where it can be cut that far, narrow."""
    works = {"1": front.whole(set())}
    with suppress(PlanError, UnsupportedModelError):
        works = {str(LEVELS[0]): front.whole(narrow), **works}
    taken = _milliseconds(works, front.device, "run the network on its example inputs")
    return Entry((np.array([float(name) for name in works]),), np.array(taken))


def _time_call(front: Calls, units: Units, call: TimedCall, step: int) -> Entry:
    """Time one call at all combinations of widths. Raises UnsupportedModelError when it doesn't run alone."""
    shares = [width.shares(units, step) for width in call.widths]
    times = np.zeros([len(one) for one in shares])
    for point in np.ndindex(times.shape):
        gone = [list(one.values())[at] for one, at in zip(shares, point, strict=True)]
        work = front.alone(call, set().union(*gone))
        (times[point],) = _milliseconds({"": work}, front.device, f"time {front.describe(call)} alone")
    return Entry(tuple(np.array(list(one)) for one in shares), times)


def _milliseconds(works: Mapping[str, Callable[[], object]], device: torch.device, what: str) -> list[float]:
    """The fastest of the repeats of each work: what slows one down isn't the network's. ``what`` is for messages."""
    try:
        taken = timing.take_turns(works, REPEATS, dict.fromkeys(works, device))
    except SecateurError:
        raise
    except Exception as error:  # runtimes have kinds of their own
        raise UnsupportedModelError(f"can't {what}: {first_line(error)}") from None
    return [1000 * min(taken[name]) for name in works]
