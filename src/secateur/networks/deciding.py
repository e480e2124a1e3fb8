"""Score, allocate, plan: the same for every front end, which supplies tensors by name and what they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from secateur.allocate import allocate_channels
from secateur.allocate.units import Limits
from secateur.errors import NonFiniteError, UnsupportedModelError, UsageError
from secateur.methods import ChannelMethod, Coupled, Method, Part
from secateur.observe.gradients import Learned
from secateur.plans import ExampleInputs, Fingerprint, Plan, Provenance
from secateur.report import Metric, Report
from secateur.report.build import build_report
from secateur.structure import Group
from secateur.structure.following import most_coupled
from secateur.structure.groups import TracedAnatomy
from secateur.versions import library_versions

Role = Callable[[str, Tensor], str]
"""Name and tensor of a parameter → ``weight``, ``scale`` or ``bias``, see ``Part``."""


def channel_method(method: Method) -> ChannelMethod:
    """The method, if it removes channels. Raises UsageError."""
    if not isinstance(method, ChannelMethod):
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
    told: Sequence[Learned] = ({},),
    ignore: Sequence[str] = (),
    seed: int = 0,
) -> Plan:
    """Which channels leave. ``told`` is what each batch of data told, for methods that look at it.

    Raises UnsupportedModelError when there are none, NonFiniteError or BudgetError.
    """
    scores = _scores(method, anatomy, tensors, role, told)
    groups = [g for g in anatomy if g.name in scores]
    if not groups:
        raise UnsupportedModelError(
            f"{anatomy.model_type} has no channels that {method.name} can remove: see its anatomy for the reasons"
        )
    provenance = Provenance(
        method=method.name,
        options=method.options() | ({"ignore": list(ignore)} if ignore else {}),
        model=model,
        seed=seed,
        dtype=str(next(iter(tensors.values())).dtype).removeprefix("torch."),
        versions=library_versions(),
        notes=tuple(f"{places[0]} keeps what it touches" for places in anatomy.trace.unknown.values()),
        inputs=inputs,
    )
    return Plan(
        provenance=(provenance,),
        groups={g.name: g.units for g in groups},
        keep=_allocated(method, anatomy, groups, scores),
        scores={g.name: scores[g.name].float() for g in groups},
    )


def _scores(
    method: ChannelMethod, anatomy: TracedAnatomy, tensors: Mapping[str, Tensor], role: Role, told: Sequence[Learned]
) -> dict[str, Tensor]:
    """Scores of all groups that may be cut, on one scale."""
    found: dict[str, list[Tensor]] = {}
    for one in told:
        for group in anatomy.of_kind("channel"):
            scores = method.score(_coupled(group, tensors, role, one))
            if scores is None:
                continue
            if not bool(torch.isfinite(scores).all()):
                raise NonFiniteError(f"scores of {group.name} hold NaN or inf")
            found.setdefault(group.name, []).append(scores.detach().double().cpu())
    return {name: method.normalized(torch.stack(many).mean(dim=0)) for name, many in found.items()}


def _coupled(group: Group, tensors: Mapping[str, Tensor], role: Role, told: Learned) -> Coupled:
    parts = []
    for part in group.slices:
        if part.tensor not in tensors:
            continue
        parameter = tensors[part.tensor]
        learned_of = {kind: by_name[part.tensor] for kind, by_name in told.items() if part.tensor in by_name}
        kind = role(part.tensor, parameter)
        parts.append(Part(part.tensor, part.dim, part.index, kind, parameter.detach(), **learned_of))
    return Coupled(group.name, group.units, tuple(parts))


def _allocated(
    method: ChannelMethod, anatomy: TracedAnatomy, groups: Sequence[Group], scores: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    units = {g.name: g.units for g in groups}

    def cost(keep: Mapping[str, Tensor]) -> int:
        if method.budget == "channels":
            return sum(len(kept) for kept in keep.values())
        removed = anatomy.units_removed({n: _complement(kept, units[n]) for n, kept in keep.items()})
        return int(getattr(anatomy.costs.without(removed), method.budget))

    if method.sparsity == 0:
        return {g.name: torch.arange(g.units) for g in groups}
    limits = Limits(budget=method.budget, min_keep=method.min_keep, round_to=method.round_to)
    return allocate_channels(scores, groups, method.sparsity, method.scope, limits, cost)


def _complement(kept: Tensor, units: int) -> Tensor:
    gone = torch.ones(units, dtype=torch.bool)
    gone[kept] = False
    return gone.nonzero().flatten()


def network_report(plan: Plan, anatomy: TracedAnatomy) -> Report:
    """What left, and what the network costs before and after."""
    report = build_report(plan, anatomy)
    report.groups = dict(plan.groups)
    way = most_coupled(anatomy, [name for name in plan.keep if len(plan.removed(name))] or list(plan.keep))
    report.ways = [way] if way else []
    removed = anatomy.units_removed({name: plan.removed(name) for name in plan.keep})
    before, after = anatomy.total, anatomy.costs.without(removed)
    budget = plan.provenance[0].options["budget"]
    report.achieved = (
        1 - sum(map(len, plan.keep.values())) / max(sum(plan.groups.values()), 1)
        if budget == "channels"
        else 1 - getattr(after, budget) / max(getattr(before, budget), 1)
    )
    for field, name, unit in (("params", "parameters", ""), ("macs", "MACs", ""), ("bytes", "bytes of weights", "B")):
        values = {"dense": float(getattr(before, field)), "pruned": float(getattr(after, field))}
        report.metrics.append(Metric(name, unit, values, higher_is_better=False, protocol="counted on the graph"))
    return report
