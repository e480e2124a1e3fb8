"""The ranks of feature maps on calibration inputs: one walk over the traced graph, batch by batch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from secateur.errors import NonFiniteError, UnsupportedModelError
from secateur.finite import all_finite
from secateur.methods import FeatureMaps
from secateur.networks.calibrating import Calibration
from secateur.observe.featuremaps import MapRanks
from secateur.structure.featuremaps import MapPlace, find_maps
from secateur.structure.groups import TracedAnatomy
from secateur.structure.trace import describe
from secateur.structure.walk import Batch, Tensors, Walk

Ranks = Mapping[str, tuple[FeatureMaps, ...]]
"""By group, the places in which its channels are feature maps."""

_NAMED = 3
"""Groups that a note names."""


def rank_maps(anatomy: TracedAnatomy, calibration: Calibration) -> Ranks:
    """Run the dense network on every batch. Raises UnsupportedModelError for one without maps, NonFiniteError."""
    places = find_maps(anatomy.trace)
    if not places:
        raise UnsupportedModelError(
            f"{anatomy.model_type} has no feature maps whose ranks could be taken: no weight in it reads channels of at"
            " least two rows and columns, as convolutions of images do"
        )
    ranks = {place.node: MapRanks() for place in places}
    order = {node: number for number, node in enumerate(anatomy.trace.graph.nodes)}
    # a tensor is there when what comes first of all that reads it is called
    due: dict[fx.Node, list[MapPlace]] = {}
    for place in places:
        due.setdefault(min(place.node.users, key=order.__getitem__), []).append(place)

    def visit(node: fx.Node, tensors: Tensors) -> None:
        for place in due.get(node, ()):
            for x in tensors(place.node):
                if not all_finite(x):
                    raise NonFiniteError(f"{describe(place.node)} gives NaN or inf on the data that was given")
                ranks[place.node].update(place.maps(x))

    with torch.no_grad():
        for traced, inputs in calibration:
            Walk(anatomy.trace, [Batch(traced.trace, inputs)]).run(visit, until=max(due, key=order.__getitem__))
    return {g.name: _of_group(anatomy, g.name, places, ranks) for g in anatomy.of_kind("channel")}


def unmapped(maps: Ranks) -> list[str]:
    """A note on the groups that stay since their channels are no feature maps."""
    names = [name for name, found in maps.items() if not found]
    if not names:
        return []
    more = f" and {len(names) - _NAMED} more groups" if len(names) > _NAMED else ""
    verb = "stay" if len(names) > 1 else "stays"
    return [f"{', '.join(names[:_NAMED])}{more} {verb}: no weight reads their channels as feature maps"]


def _of_group(
    anatomy: TracedAnatomy, name: str, places: list[MapPlace], ranks: dict[fx.Node, MapRanks]
) -> tuple[FeatureMaps, ...]:
    units = anatomy.ids[name]
    found = []
    for place in places:
        if place.units.isdisjoint(units):
            continue
        labels = anatomy.trace.value(place.node).dims[place.dim]
        channels = tuple(map(torch.from_numpy, anatomy.trace.units.positions(labels, units)))
        found.append(FeatureMaps(describe(place.node), ranks[place.node], channels))
    return tuple(found)
