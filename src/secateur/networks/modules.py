"""Any torch module, traced: what a method sees of it, and the plan that comes of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.errors import DataError
from secateur.healing.starting import NORMS
from secateur.latencytable import LatencyTable
from secateur.methods import ChannelMethod, Fitting, Method, Observed
from secateur.methods.views import Flow
from secateur.networks.applying import apply_to_module, copied, masked_module, module_anatomy, module_fingerprint
from secateur.networks.calibrating import Calibration, calibration_of
from secateur.networks.deciding import channel_method, decide_channels, decide_densities, noted
from secateur.networks.example import Example
from secateur.networks.featuremaps import rank_maps, unmapped
from secateur.networks.fitting import fitted, observe
from secateur.networks.kinds import Asked
from secateur.networks.latency import Latencies, Progress, measure_latencies
from secateur.networks.timedcalls import ModuleCalls
from secateur.observe.flow import synaptic_flow
from secateur.observe.gradients import Learned, Loss, cross_entropy, learned
from secateur.plans import Plan
from secateur.structure.exporting import evaluation_mode
from secateur.structure.groups import TracedAnatomy
from secateur.structure.resize import Cut

_NOTHING = Asked()
_NAMED = 3
"""Modules that a note names."""
_OF_INPUTS = frozenset({"inputs", "maps"})
"""What methods need that a walk over the dense network tells, without gradients."""


def plan_module(
    method: Method,
    anatomy: TracedAnatomy,
    example: Example,
    asked: Asked = _NOTHING,
    latencies: Latencies | None = None,
) -> Plan:
    """Decide which channels leave a traced module, which is left as it is.

    Raises UsageError, DataError, NonFiniteError or BudgetError.
    """
    chosen, module = channel_method(method), anatomy.trace.module
    calibration: Calibration = []
    seen, observed = None, Observed()
    if _OF_INPUTS.intersection(chosen.needed()):
        calibration = _calibration(chosen, anatomy, example, asked)
    if "inputs" in chosen.needed():
        seen = observe(anatomy, calibration, norms=_fitting(chosen).norms)
        observed = Observed(consumers=seen.consumers())
    if "maps" in chosen.needed():
        observed = replace(observed, maps=rank_maps(anatomy, calibration))
    plan = decide_channels(
        chosen,
        anatomy,
        dict(module.named_parameters(remove_duplicate=False)),
        lambda name, parameter: _role(module, name, parameter),
        model=module_fingerprint(module),
        inputs=example.recorded(),
        probe=_probe(chosen, anatomy, example, asked.data, asked.loss, asked.seed),
        observed=observed,
        asked=asked,
        latencies=latencies,
    )
    plan = noted(plan, [*unmapped(observed.maps), *_unread(anatomy)])
    return fitted(chosen, plan, seen, calibration) if seen else plan


def _unread(anatomy: TracedAnatomy) -> list[str]:
    """Notes on modules and parameters that are no part of what was traced, nor surely of its branches for training."""
    trace = anatomy.trace
    found = []
    if alone := _places(trace.module, set(trace.alone)):
        found.append(
            f"{alone}: nothing that was traced reads it, so channels that are inputs there may leave while these"
            " parameters stay as they are"
        )
    if recorded := _places(trace.module, set(trace.recorded)):
        found.append(
            f"{recorded}: only training reads it, in a branch that can't be exported, so it follows what it"
            " reads on the example inputs"
        )
    return found


def _places(module: nn.Module, names: set[str]) -> str:
    """The modules and parameters that are made of nothing but these parameters, the first of them by name."""
    inside = {path: {n for n, _ in part.named_parameters(path)} for path, part in module.named_modules() if path}
    inside |= {name: {name} for name, _ in module.named_parameters()}
    found: list[str] = []
    for place, mine in inside.items():
        if mine and mine <= names and not any(place.startswith(f"{outer}.") for outer in found):
            found.append(place)
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return f"{', '.join(found[:_NAMED])}{more}"


def _fitting(method: ChannelMethod) -> Fitting:
    return method.fitting() or Fitting()


def _calibration(method: ChannelMethod, anatomy: TracedAnatomy, example: Example, asked: Asked) -> Calibration:
    """See ``calibration_of``. Raises DataError."""
    noise = _fitting(method).noise
    if asked.data is None and noise is None:
        instead = ", or take calibration='noise'" if "calibration" in method.options() else ""
        raise DataError(f"{method.name} needs data: give data= (batches of inputs){instead}")
    again = partial(module_anatomy, anatomy.trace.module, heads=method.heads, ignore=asked.ignore)
    return calibration_of(asked.data, noise, example, anatomy, again)


def module_densities(
    method: Method, anatomy: TracedAnatomy, example: Example, *, data: Any = None, loss: Loss | None = None
) -> dict[str, float]:
    """See ``decide_densities``. Raises DataError too."""
    chosen, module = channel_method(method), anatomy.trace.module
    return decide_densities(
        chosen,
        anatomy,
        dict(module.named_parameters(remove_duplicate=False)),
        lambda name, parameter: _role(module, name, parameter),
        _probe(chosen, anatomy, example, data, loss),
    )


def _probe(
    method: ChannelMethod, anatomy: TracedAnatomy, example: Example, data: Any, loss: Loss | None, seed: int = 0
) -> _Probe:
    if _of_gradients(method) and data is None:
        raise DataError(f"{method.name} needs data: give data= (batches) and, for anything but a classifier, loss=")
    return _Probe(method, anatomy, example, data, loss or cross_entropy, seed)


def _of_gradients(method: ChannelMethod) -> list[str]:
    return [need for need in method.needed() if need not in _OF_INPUTS]


@dataclass(frozen=True)
class _Probe:
    """Runs a module for a method, see ``Probe``."""

    method: ChannelMethod
    anatomy: TracedAnatomy
    example: Example
    data: Any
    loss: Loss
    seed: int

    def learned(self, removed: Iterable[int]) -> list[Learned]:
        needs = _of_gradients(self.method)
        if not needs:
            return [{}]
        module = self._without(removed)
        with evaluation_mode(module):
            probes = getattr(self.method, "probes", 1)
            return learned(module, self.data, self.loss, needs, self.method.per_batch, probes=probes, seed=self.seed)

    def flow(self, removed: Iterable[int]) -> Flow:
        def under(masks: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
            module = self._without(removed)
            parameters = dict(module.named_parameters(remove_duplicate=False))
            replaced = {n: parameters[n].detach() * mask.to(parameters[n].device) for n, mask in masks.items()}
            return synaptic_flow(module, self.example.args, self.example.kwargs or {}, replaced)

        return under

    def _without(self, removed: Iterable[int]) -> nn.Module:
        """The module, or a copy with zeros where units have left."""
        module, gone = self.anatomy.trace.module, set(removed)
        return masked_module(Cut(self.anatomy.trace, gone), copied(module)) if gone else module


@dataclass(frozen=True)
class ModuleNetwork:
    """A traced torch module."""

    anatomy: TracedAnatomy
    example: Example
    latencies: Latencies | None = None

    @classmethod
    def open(cls, module: nn.Module, example: Example, *, heads: str, ignore: Sequence[str]) -> ModuleNetwork:
        """Trace it. Raises UsageError or UnsupportedModelError."""
        return cls(module_anatomy(module, example, heads=heads, ignore=ignore), example)

    def timed(self, path: str | Path | None, step: int, progress: Progress) -> ModuleNetwork:
        """See ``measure_latencies``."""
        kwargs = dict(self.example.kwargs or {})
        calls = ModuleCalls(self.anatomy, self.anatomy.trace.module, self.example.args, kwargs)
        table = LatencyTable.open(path)
        return replace(self, latencies=measure_latencies(self.anatomy, calls, table, step, progress))

    def plan(self, method: Method, asked: Asked) -> Plan:
        """See ``plan_module``."""
        return plan_module(method, self.anatomy, self.example, asked, self.latencies)

    def cut(self, plan: Plan, *, inplace: bool, optimizer: Optimizer | None = None) -> tuple[nn.Module, list[str]]:
        """See ``apply_to_module``; a note says why a module became a graph."""
        module, example = self.anatomy.trace.module, self.example
        made = apply_to_module(
            plan, module, anatomy=self.anatomy, example=example, inplace=inplace, optimizer=optimizer
        )
        why = made.graph_because
        if not why:
            return made.module, []
        sizes = "" if any(example.free) else "; it takes the sizes of the example inputs, dynamic_shapes= frees some"
        return made.module, [f"a GraphModule, since the module's own code couldn't follow: {why}{sizes}"]


def _role(module: nn.Module, name: str, parameter: Tensor) -> str:
    path, _, leaf = name.rpartition(".")
    if leaf == "weight" and isinstance(module.get_submodule(path), NORMS):
        return "scale"
    return "weight" if parameter.dim() > 1 else "bias"
