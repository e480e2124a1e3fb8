"""Which calls of a network the channels of one group pass through: what a picture of a coupled group shows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from secateur.structure.groups import TracedAnatomy
from secateur.structure.traced import Step, Value

MAKES, CARRIES, READS = "makes", "carries", "reads"


@dataclass(frozen=True)
class Stop:
    """A call on the way: it ``makes`` the channels out of others, ``carries`` them on, or ``reads`` them for the last
    time. ``places`` are the dimensions of parameters (``conv1.weight[0]``) that are cut with them."""

    operator: str
    where: str
    role: str
    places: tuple[str, ...] = ()


@dataclass(frozen=True)
class Way:
    """The way of a group's channels: its stops, and (from, to) for every tensor that has them."""

    group: str
    units: int
    stops: tuple[Stop, ...]
    links: tuple[tuple[int, int], ...]


def follow(anatomy: TracedAnatomy, group: str) -> Way:
    """Follow one channel of a group through all calls; the others of the group go the same way."""
    channel = anatomy.ids[group][0]

    def has(values: Iterable[Value]) -> bool:
        return any((anatomy.trace.units.table(labels) == channel).any() for v in values for labels in v.dims)

    def places(step: Step) -> tuple[str, ...]:
        return tuple(
            f"{name}[{dim}]"
            for name, value in step.parameters.items()
            for dim, labels in enumerate(value.dims)
            if (anatomy.trace.units.table(labels) == channel).any()
        )

    stops: list[Stop] = []
    links: list[tuple[int, int]] = []
    number: dict[int, int] = {}
    carrying: set[int] = set()
    for index, step in enumerate(anatomy.trace.steps()):
        sources, cut, goes_on = [s for s in step.sources if s in carrying], places(step), has(step.outputs)
        if not (sources or cut or goes_on):
            continue
        if goes_on:
            carrying.add(index)
        role = READS if not goes_on else CARRIES if sources else MAKES
        number[index] = len(stops)
        links += [(number[source], number[index]) for source in sources]
        stops.append(Stop(step.operator, step.where, role, cut))
    return Way(group, anatomy[group].units, tuple(stops), tuple(links))


def most_coupled(anatomy: TracedAnatomy, groups: Iterable[str], most: int = 48) -> Way | None:
    """The way of the group that couples the most dimensions in at most ``most`` calls; None when all take more."""
    for name in sorted(groups, key=lambda name: -len(anatomy[name].slices))[:8]:
        way = follow(anatomy, name)
        if len(way.stops) <= most:
            return way
    return None
