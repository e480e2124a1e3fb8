"""Score, allocate, plan: the same for every front end, which supplies tensors by name and what they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from secateur.allocate import CostOf, allocate_channels
from secateur.allocate.units import Limits
from secateur.errors import NonFiniteError, UnsupportedModelError, UsageError, nearest
from secateur.finite import all_finite
from secateur.methods import ChannelMethod, Coupled, Method, Observed, Part, Whole
from secateur.methods.views import Flow
from secateur.networks.kinds import Asked
from secateur.networks.latency import Latencies
from secateur.observe.gradients import Learned
from secateur.plans import Plan
from secateur.provenance import ExampleInputs, Fingerprint, Provenance
from secateur.report import Metric, Report
from secateur.report.build import build_report
from secateur.structure import Group
from secateur.structure.following import most_coupled
from secateur.structure.groups import TracedAnatomy, matches
from secateur.versions import library_versions

Role = Callable[[str, Tensor], str]
"""Name and tensor of a parameter → ``weight``, ``scale`` or ``bias``, see ``Part``."""

_NOTHING = Observed()
_NAMED = 3
"""Groups that a note names."""


class Probe(Protocol):
    """What a network tells when it runs, with zeros where ``removed`` units have left already."""

    def learned(self, removed: Iterable[int]) -> Sequence[Learned]:
        """What each batch of data tells, or all of them together."""
        ...

    def flow(self, removed: Iterable[int]) -> Flow:
        """Synaptic flow under masks."""
        ...


def channel_method(method: Method) -> ChannelMethod:
    """The method, if it removes channels. Raises UsageError."""
    if not isinstance(method, ChannelMethod):
        if method.instead:
            raise UsageError(f"{method.name} {method.instead.format(name=method.name)}")
        raise UsageError(
            f"{method.name} doesn't remove channels of networks: 'secateur methods' shows which methods do"
        )
    return method


def decide_channels(
    method: ChannelMethod,
    anatomy: TracedAnatomy,
    tensors: Mapping[str, Tensor],
    role: Role,
    *,
    model: Fingerprint,
    inputs: ExampleInputs,
    probe: Probe,
    observed: Observed = _NOTHING,
    asked: Asked,
    latencies: Latencies | None = None,
) -> Plan:
    """Which channels leave. ``probe`` runs the network, for methods that look at what it does; ``observed`` is what it
    told on inputs, for methods that look at these; ``latencies`` for methods whose budget they are.

    Raises UnsupportedModelError when there are none, NonFiniteError or BudgetError.
    """
    keep: dict[str, Tensor] = {}
    scores: dict[str, Tensor] = {}
    groups: list[Group] = []
    shares = _shares(anatomy, asked.ratios)
    for sparsity in method.schedule():
        removed = _removed(anatomy, keep)
        scores = _gone_last(_scores(method, anatomy, tensors, role, probe, removed, observed), keep)
        groups = [g for g in anatomy if g.name in scores]
        if not groups:
            raise UnsupportedModelError(
                f"{anatomy.model_type} has no channels that {method.name} can remove: see its anatomy for the reasons"
            )
        keep = _allocated(method, anatomy, groups, scores, sparsity, shares, latencies)
    notes = [f"{places[0]} keeps what it touches" for places in anatomy.trace.unknown.values()]
    notes += _inexact(anatomy, groups, keep)
    if latencies is not None:
        notes.append(latencies.note(_removed(anatomy, keep)))
    provenance = Provenance(
        method=method.name,
        options=method.options() | _beside(asked),
        model=model,
        seed=asked.seed,
        dtype=str(next(iter(tensors.values())).dtype).removeprefix("torch."),
        versions=library_versions(),
        notes=tuple(notes),
        inputs=inputs,
        initialised=method.initialisation(),
    )
    return Plan(
        provenance=(provenance,),
        groups={g.name: g.units for g in groups},
        keep=keep,
        scores={g.name: scores[g.name].float() for g in groups},
    )


def _inexact(anatomy: TracedAnatomy, groups: Iterable[Group], keep: Mapping[str, Tensor]) -> Iterator[str]:
    """A note for every reason why the network masked by this plan differs from the cut one."""
    reasons: dict[str, list[str]] = {}
    for group in groups:
        if group.inexact and len(keep[group.name].unique()) < group.units:
            reasons.setdefault(group.inexact, []).append(group.name)
    for why, names in reasons.items():
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        yield f"masked and cut network differ in {', '.join(names[:_NAMED])}{more}: {why}"


def _scores(
    method: ChannelMethod,
    anatomy: TracedAnatomy,
    tensors: Mapping[str, Tensor],
    role: Role,
    probe: Probe,
    removed: set[int],
    observed: Observed,
) -> dict[str, Tensor]:
    """Scores of all groups that may be cut, on one scale."""
    found: dict[str, list[Tensor]] = {}
    for whole in _wholes(anatomy, tensors, role, probe, removed, observed):
        for name, scores in method.scores(whole).items():
            if scores is None:
                continue
            if not all_finite(scores):
                raise NonFiniteError(f"scores of {name} hold NaN or inf")
            found.setdefault(name, []).append(scores.detach().double().cpu())
    return {name: method.normalized(torch.stack(many).mean(dim=0)) for name, many in found.items()}


def _wholes(
    anatomy: TracedAnatomy,
    tensors: Mapping[str, Tensor],
    role: Role,
    probe: Probe,
    removed: set[int],
    observed: Observed,
) -> Iterator[Whole]:
    """The network as a method sees it, once per batch of data or once for all of them."""
    for one in probe.learned(removed):
        groups = tuple(_coupled(group, tensors, role, one, observed) for group in anatomy.of_kind("channel"))
        yield Whole(groups, tensors, one, probe.flow(removed), anatomy)


def decide_densities(
    method: ChannelMethod, anatomy: TracedAnatomy, tensors: Mapping[str, Tensor], role: Role, probe: Probe
) -> dict[str, float]:
    """The fraction of its weights that each layer should keep, by the name of the weight.

    Raises UsageError for a method that has no densities, NonFiniteError or BudgetError.
    """
    whole = next(_wholes(anatomy, tensors, role, probe, set(), _NOTHING))
    found = method.layer_densities(whole)
    if found is None:
        raise UsageError(f"{method.name} doesn't give layers densities; precrop and preconfig do")
    return {layer.tensor: float(density) for layer, density in zip(whole.layers, found, strict=True)}


def _gone_last(scores: Mapping[str, Tensor], keep: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Scores in which units that have left already rank behind all others."""
    lowest = min((float(s.min()) for s in scores.values()), default=0.0)
    found = {name: scores_U.clone() for name, scores_U in scores.items()}
    for name, kept in keep.items():
        found[name][_complement(kept, len(found[name]))] = lowest - 1
    return found


def _coupled(group: Group, tensors: Mapping[str, Tensor], role: Role, told: Learned, observed: Observed) -> Coupled:
    parts = []
    for part in group.slices:
        if part.tensor not in tensors:
            continue
        parameter = tensors[part.tensor]
        learned_of = {kind: by_name[part.tensor] for kind, by_name in told.items() if part.tensor in by_name}
        kind = role(part.tensor, parameter)
        parts.append(Part(part.tensor, part.dim, part.index, kind, parameter.detach(), **learned_of))
    consumers, maps = observed.consumers.get(group.name, ()), observed.maps.get(group.name, ())
    return Coupled(group.name, group.units, tuple(parts), consumers, maps)


def _allocated(
    method: ChannelMethod,
    anatomy: TracedAnatomy,
    groups: Sequence[Group],
    scores: Mapping[str, Tensor],
    sparsity: float,
    shares: Mapping[str, float],
    latencies: Latencies | None,
) -> dict[str, Tensor]:
    if sparsity == 0 and not shares:
        return {g.name: torch.arange(g.units) for g in groups}
    whole = {g.name: torch.arange(g.units) for g in groups}
    # there are scores of more units than a group has where it may grow
    grown = [replace(g, units=len(scores[g.name])) for g in groups]

    def cost_of(budget: str) -> CostOf:
        def cost(wanted: Mapping[str, Tensor]) -> float:
            keep = {name: _real(kept, anatomy[name].units) for name, kept in wanted.items()}
            return _cost(anatomy, budget, keep, latencies)

        return cost

    found: dict[str, Tensor] = {}
    for budget, fraction in method.budgets(sparsity).items():
        limits = Limits(budget=budget, min_keep=method.min_keep, round_to=method.round_to)
        cost = cost_of(budget)
        one = allocate_channels(scores, grown, fraction, method.scope, limits, cost, cost(whole), shares)
        # all budgets follow one order of leaving, so the smaller set is within the larger one
        found = {name: min(kept, found.get(name, kept), key=len) for name, kept in one.items()}
    return {g.name: _real(found[g.name], g.units) for g in groups}


def _beside(asked: Asked) -> dict[str, Any]:
    """What a plan records beside the options of its method."""
    found: dict[str, Any] = {"ignore": list(asked.ignore)} if asked.ignore else {}
    return found | ({"ratios": dict(asked.ratios)} if asked.ratios else {})


def _shares(anatomy: TracedAnatomy, ratios: Mapping[str, float]) -> dict[str, float]:
    """Fraction that leaves, by group; the first pattern that fits a group counts. Raises UsageError."""
    names = [group.name for group in anatomy.of_kind("channel")]
    found: dict[str, float] = {}
    for pattern, ratio in ratios.items():
        if not 0 <= ratio < 1:
            raise UsageError(f"the ratio of {pattern} must lie in [0, 1), got {ratio}")
        fitting = [name for name in names if matches(name, pattern)]
        if not fitting:
            raise UsageError(f"ratios: {pattern!r} is no group that can be cut{nearest(pattern, names)}")
        found = dict.fromkeys(fitting, ratio) | found
    return found


def _real(kept: Tensor, units: int) -> Tensor:
    """Which units these are, when those from ``units`` on are copies; a unit is there as often as it is named."""
    return (kept % units).sort().values


def _cost(anatomy: TracedAnatomy, budget: str, keep: Mapping[str, Tensor], latencies: Latencies | None) -> float:
    """What the network costs with these units of its groups, in the unit of the budget."""
    if budget == "channels":
        return sum(map(len, keep.values()))
    removed = _removed(anatomy, keep)
    if latencies is not None:
        return latencies.without(removed)
    return getattr(anatomy.costs.without(removed, anatomy.units_grown(keep)), budget)


def _removed(anatomy: TracedAnatomy, keep: Mapping[str, Tensor]) -> set[int]:
    return anatomy.units_removed({name: _complement(kept, anatomy[name].units) for name, kept in keep.items()})


def _complement(kept: Tensor, units: int) -> Tensor:
    gone = torch.ones(units, dtype=torch.bool)
    gone[kept] = False
    return gone.nonzero().flatten()


def noted(plan: Plan, notes: Iterable[str]) -> Plan:
    """The plan with more notes."""
    provenance = plan.provenance[0]
    return replace(plan, provenance=(provenance.model_copy(update={"notes": (*provenance.notes, *notes)}),))


def network_report(plan: Plan, anatomy: TracedAnatomy, latencies: Latencies | None = None) -> Report:
    """What left, and what the network costs before and after."""
    report = build_report(plan, anatomy)
    report.groups = dict(plan.groups)
    way = most_coupled(anatomy, [name for name in plan.keep if len(plan.removed(name))] or list(plan.keep))
    report.ways = [way] if way else []
    removed = anatomy.units_removed({name: plan.removed(name) for name in plan.keep})
    before, after = anatomy.total, anatomy.costs.without(removed, anatomy.units_grown(plan.keep))
    budget = plan.provenance[0].options["budget"]
    dense = {name: torch.arange(units) for name, units in plan.groups.items()}
    whole = _cost(anatomy, budget, dense, latencies)
    report.achieved = 1 - _cost(anatomy, budget, plan.keep, latencies) / whole if whole else 0.0
    for field, name, unit in (("params", "parameters", ""), ("macs", "MACs", ""), ("bytes", "bytes of weights", "B")):
        values = {"dense": float(getattr(before, field)), "pruned": float(getattr(after, field))}
        report.metrics.append(Metric(name, unit, values, higher_is_better=False, protocol="counted on the graph"))
    if latencies is not None:
        values = {"dense": latencies.without(()), "pruned": latencies.without(removed)}
        how = f"expected from calls timed alone; {latencies.about}"
        report.metrics.append(Metric("expected latency", "ms", values, higher_is_better=False, protocol=how))
    return report
