"""The end of a training whose channels left: the network is cut, and held against the one with zeros."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from secateur.errors import UnsupportedModelError
from secateur.networks.applying import apply_to_module
from secateur.networks.example import Example
from secateur.plans import Plan
from secateur.trainer.examples import Examples
from secateur.trainer.networks import Network

TOLERANCE = 1e-3
"""Largest difference of an output, of its standard deviation: far above rounding, far below what a channel does."""


def cut_network(network: Network, plan: Plan, examples: Examples) -> tuple[Network, list[str]]:
    """(the network cut by a plan of its channels, what is to be said of it). The one with zeros stays as it is.

    Raises UnsupportedModelError when both don't give the same on what is measured on.
    """
    args, kwargs = examples.example()
    cut = apply_to_module(plan, network.module, example=Example(args, kwargs))
    apart = difference(network.module, cut.module, examples)
    if not apart <= TOLERANCE:
        raise UnsupportedModelError(
            f"cut by its plan, it gives outputs that are {apart:.2g} of their standard deviation from those with zeros"
        )
    notes = [
        "the network was cut: its outputs on what it was measured on are those with zeros, to"
        f" {apart:.1e} of their standard deviation"
    ]
    if cut.graph_because is not None:
        notes.append(f"the cut network is a torch.fx.GraphModule, because {cut.graph_because}")
    return replace(network, module=cut.module), notes


def difference(one: nn.Module, other: nn.Module, examples: Examples) -> float:
    """The largest difference between the outputs of both, over their standard deviation; both go to evaluation mode."""
    with torch.no_grad():
        here, there = (examples.outputs(module.eval()).double() for module in (one, other))
    return float((here - there).abs().max() / here.std().clamp_min(torch.finfo(torch.float32).tiny))
