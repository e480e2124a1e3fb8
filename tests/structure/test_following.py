"""The way of a group's channels through a network: what the picture in the report shows."""

import torch

from channel_networks import Residual
from secateur.structure.following import CARRIES, MAKES, READS, Stop, follow, most_coupled
from secateur.structure.groups import traced_anatomy
from secateur.structure.trace import trace


def anatomy():
    return traced_anatomy(trace(Residual(), (torch.randn(1, 3, 12, 12),)))


def test_the_inner_channels_of_a_residual_block():
    way = follow(anatomy(), "conv1")
    assert way.units == 24
    assert [(stop.operator, stop.role) for stop in way.stops] == [
        ("conv2d", MAKES),
        ("batch_norm", CARRIES),
        ("relu", CARRIES),
        ("conv2d", READS),
    ]
    assert way.stops[0].places == ("conv1.weight[0]",)
    assert way.stops[3] == Stop("conv2d", "conv2", READS, ("conv2.weight[1]",))
    assert way.links == ((0, 1), (1, 2), (2, 3))


def test_the_stream_is_made_twice_and_read_three_times():
    way = follow(anatomy(), "stem.0")
    made = [stop.where for stop in way.stops if stop.role == MAKES]
    read = [stop.where for stop in way.stops if stop.role == READS]
    assert made == ["stem.0", "conv2"]
    assert read == ["conv1", "point", "head"]
    add = next(i for i, stop in enumerate(way.stops) if stop.operator == "add")
    assert sum(end == add for _, end in way.links) == 2
    # every dimension of a parameter that leaves is at one of the calls
    found = anatomy()
    shown = sorted(place for stop in way.stops for place in stop.places)
    assert shown == sorted(f"{part.tensor}[{part.dim}]" for part in found["stem.0"].slices)


def test_the_most_coupled_group_that_can_be_drawn():
    found = anatomy()
    names = [group.name for group in found.of_kind("channel")]
    shortest = min(len(follow(found, name).stops) for name in names)
    assert most_coupled(found, names).group == "stem.0"
    assert len(most_coupled(found, names, most=5).stops) <= 5
    assert most_coupled(found, names, most=shortest - 1) is None
