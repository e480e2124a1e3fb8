"""Units that leave step by step: how many are due when the sparsity of a block has grown, and which of them go last.

Of a group with C channels at the beginning, sparsity s leaves int(C * (1 - s)); only whole units go, so that a head
leaves when its last channel is due. Source: Adapt-Pruner, arXiv:2502.03460, and its official code.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from secateur.allocate.shares import part_of
from secateur.allocate.units import Bundle
from secateur.structure import Group


@dataclass(frozen=True)
class Due:
    """A bundle of units that leaves within a step, and when: 0 at its beginning, 1 at its end."""

    bundle: Bundle
    time: float


def due(
    group: Group, worst_first: Iterable[Bundle], gone: int, before: float, after: float, *, further: bool = False
) -> list[Due]:
    """What leaves ``group``, of which ``gone`` units have left, when its sparsity goes from ``before`` to ``after``.

    ``worst_first`` are the bundles that may leave. ``further`` also names those that would, if it went on like this.
    """
    if further and after <= before:
        return []
    channels = group.columns.shape[1] // group.parts
    whole, left = group.units * channels, (group.units - gone) * channels
    # what sums of fractions lose is no channel
    number = left - part_of(whole, 1 - after)
    found: list[Due] = []
    count = 0
    for bundle in worst_first:
        count += len(bundle.units) * channels
        if count > number and not further:
            break
        reached = (whole - left + count) / whole
        found.append(Due(bundle, (reached - before) / (after - before) if after > before else 0.0))
    return found


def taken(every: Sequence[Due], removed: int, target: float, finest: int) -> list[Bundle]:
    """The bundles that leave until what was ``removed`` comes as near to the ``target`` as whole bundles can.

    In the order in which they are due; one that is too large is left out. ``finest`` is the smallest cost of one.
    """
    found: list[Bundle] = []
    for one in sorted(every, key=lambda due: due.time):
        if removed + one.bundle.cost <= target + finest / 2:
            found.append(one.bundle)
            removed += one.bundle.cost
    return found
