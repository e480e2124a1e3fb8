"""Cutting small networks in tests: random units leave, and two references say what the rest must compute.

``Reference`` zeroes what leaves in every tensor of the graph. ``zeroed`` is a second opinion that knows nothing about
intermediate tensors: the user's own module, with zeros in its parameters and buffers at the slices of the groups.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from secateur.structure.graphcut import Reference, cut_graph
from secateur.structure.groups import TracedAnatomy, traced_anatomy
from secateur.structure.resize import Cut
from secateur.structure.trace import Trace, trace

# pytest formats every message of torch.export's own log, which takes as long as all the rest
logging.getLogger("torch.__trace").propagate = False


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """In float64 and evaluation mode, with norms, biases and running statistics that differ from their defaults."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 4
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * fan_in**-0.5)
            if parameter.dim() <= 1:
                parameter.add_(0.5)
        for name, buffer in module.named_buffers():
            if "running_mean" in name:
                buffer.copy_(torch.randn(buffer.shape, generator=generator, dtype=torch.float64))
            if "running_var" in name:
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator, dtype=torch.float64))
    return module


def images(*shape: int, seed: int = 0) -> tuple[Tensor]:
    """One float64 input of this shape, whatever it means."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64),)


def tokens(*shape: int, below: int, seed: int = 0) -> tuple[Tensor]:
    return (torch.randint(below, shape, generator=torch.Generator().manual_seed(seed)),)


def anatomy_of(module: nn.Module, inputs: Sequence[Any], **options: Any) -> TracedAnatomy:
    return traced_anatomy(trace(module, inputs), **options)


@dataclass(frozen=True)
class Pruned:
    """A network, what left it, and the cut graph."""

    module: nn.Module
    inputs: tuple[Any, ...]
    anatomy: TracedAnatomy
    removed: Mapping[str, Tensor]
    graph: fx.GraphModule

    @property
    def trace(self) -> Trace:
        assert self.anatomy.trace is not None
        return self.anatomy.trace

    @property
    def units(self) -> set[int]:
        return self.anatomy.units_removed(self.removed)

    @property
    def cut(self) -> Cut:
        return Cut(self.trace, self.units)

    @property
    def sizes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the cut parameters and buffers."""
        return {name: tuple(t.shape) for name, t in [*self.graph.named_parameters(), *self.graph.named_buffers()]}


def choose(anatomy: TracedAnatomy, fraction: float = 0.4, seed: int = 0) -> dict[str, Tensor]:
    """Random units of all groups that may be cut, at least one and never all of them."""
    generator = torch.Generator().manual_seed(seed)
    removed = {}
    for group in anatomy.groups:
        if group.frozen is None and group.units > 1:
            count = min(group.units - 1, max(1, round(group.units * fraction)))
            removed[group.name] = torch.randperm(group.units, generator=generator)[:count]
    return removed


def pruned(
    module: nn.Module, inputs: tuple[Any, ...], removed: Mapping[str, Iterable[int]] | None = None, **options: Any
) -> Pruned:
    """Cut these units, or random ones of all groups. Raises SecateurError."""
    return pruned_anatomy(module, inputs, anatomy_of(module, inputs, **options), removed)


def pruned_anatomy(
    module: nn.Module,
    inputs: tuple[Any, ...],
    anatomy: TracedAnatomy,
    removed: Mapping[str, Iterable[int]] | None = None,
    fraction: float = 0.4,
    seed: int = 0,
) -> Pruned:
    """The same for what was traced already."""
    if removed is None:
        chosen = choose(anatomy, fraction, seed)
    else:
        chosen = {n: torch.as_tensor(list(u)) for n, u in removed.items()}
    assert anatomy.trace is not None
    graph = cut_graph(Cut(anatomy.trace, anatomy.units_removed(chosen)))
    return Pruned(module, inputs, anatomy, chosen, graph)


def zeroed(found: Pruned) -> nn.Module:
    """The user's module with zeros in every tensor at what leaves."""
    module = copy.deepcopy(found.module)
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    with torch.no_grad():
        for name, units in found.removed.items():
            for part in found.anatomy[name].slices:
                if part.tensor in tensors:
                    tensors[part.tensor].index_fill_(part.dim, part.index[units].reshape(-1).unique(), 0)
    return module


def difference(first: Any, second: Any) -> float:
    """The largest difference of two outputs, relative to the second's largest entry."""
    worst = 0.0
    for a, b in zip(tree_leaves(first), tree_leaves(second), strict=True):
        if isinstance(a, Tensor) and a.numel():
            assert a.shape == b.shape
            assert torch.isfinite(a).all() and torch.isfinite(b).all()
            worst = max(worst, float((a - b).abs().max() / b.abs().max().clamp(min=1e-3)))
    return worst


def inexact(found: Pruned) -> list[str]:
    """Groups that lost units over which an average runs."""
    return [name for name in found.removed if found.anatomy[name].inexact]


def check(found: Pruned, tolerance: float = 1e-10, dense: fx.GraphModule | None = None) -> None:
    """The cut graph equals both references, and costs are what they were said to be.

    ``dense`` is the traced graph if it was compared with the module already, by ``check_traced``.
    """
    dense = dense or check_traced(found.trace, found.module, found.inputs, tolerance)
    with torch.no_grad():
        result = found.graph(*found.inputs)
        zeros = Reference(found.trace, found.units, dense).run(*tree_leaves(found.inputs))
        assert difference(result, zeros) < tolerance
        if not inexact(found):
            assert difference(result, zeroed(found)(*found.inputs)) < tolerance
    check_costs(found)


def check_traced(traced: Trace, module: nn.Module, inputs: tuple[Any, ...], tolerance: float) -> fx.GraphModule:
    """The traced graph, which gives what the module gives."""
    graph = traced.exported.graph_module()
    with torch.no_grad():
        assert difference(Reference(traced, set(), graph).run(*tree_leaves(inputs)), module(*inputs)) < tolerance
    return graph


def check_costs(found: Pruned) -> None:
    costs = found.anatomy.costs
    assert costs is not None
    assert found.anatomy.total.params == sum(p.numel() for p in found.module.parameters())
    assert costs.without(found.units).params == sum(p.numel() for p in found.graph.parameters())
    for group in found.anatomy.groups:
        unit = found.anatomy.ids[group.name][-1]  # type: ignore[index]
        assert costs.without({unit}) + group.cost == found.anatomy.total
