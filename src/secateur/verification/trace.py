"""Where the decisions of a plan end up: later steps cut what earlier ones masked, and renumber the layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from secateur.models.decoders import decoder_anatomy, decoder_blocks
from secateur.models.rotation import rotate_model
from secateur.models.surgery import Removal, remove_units
from secateur.models.weightless import weightless_copy
from secateur.verification.findings import Finding
from secateur.verification.plans import StoredPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Masked:
    """A mask of one step, and the positions (dim, kept) of its weight that are left at the end of the last step."""

    plan: StoredPlan
    name: str
    cuts: list[tuple[int, Tensor]] = field(default_factory=list)

    @property
    def has_values(self) -> bool:
        return self.name in self.plan.parts["value"]

    def expected(self) -> tuple[Tensor, Tensor | None]:
        """(mask, values in its shape or None) as they concern the saved weight."""
        mask, values = self.plan.mask(self.name), self.plan.values(self.name)
        if values is not None:
            values = torch.zeros(mask.shape, dtype=values.dtype).masked_scatter_(mask, values)
        for dim, kept in self.cuts:
            mask = mask.index_select(dim, kept)
            values = None if values is None else values.index_select(dim, kept)
        return mask, values


@dataclass
class Trace:
    """What all steps together leave. ``masks`` go by the final name of the weight, in the order of the steps.

    ``units`` is the number of units of every group that was cut, ``model`` the skeleton after all cuts, when the base
    model is known. ``renamed`` tells that layers left, and with them the names of the base model.
    """

    masks: dict[str, list[Masked]] = field(default_factory=dict)
    units: dict[str, int] = field(default_factory=dict)
    model: PreTrainedModel | None = None
    renamed: bool = False
    head_unit: str = "kv"
    rotated: bool = False
    """Whether hidden states were turned, so that no weight is one of the base model."""
    trained: bool = False
    """Whether the model was trained after a cut, so that what is kept has other values."""


def trace(plans: Sequence[StoredPlan], blocks: str, base: PreTrainedModel | None, finding: Finding) -> Trace:
    """Follow the steps; ``blocks`` is the name of the list of decoder blocks, ``base`` the skeleton of the base model.

    Problems, such as a step that cuts what the one before didn't leave, go to ``finding``.
    """
    found = Trace(model=weightless_copy(base) if base is not None else None)
    for plan in plans:
        found.trained |= any(p.recoveries for p in plan.document.provenance)
        if plan.head_unit != found.head_unit:
            # the same heads are counted in other units from here on
            found.units = {name: n for name, n in found.units.items() if not name.endswith(".attention")}
            found.head_unit = plan.head_unit
        for name in plan.document.masks:
            masked = Masked(plan, name)
            # new values replace what was zero before
            found.masks[name] = [masked] if masked.has_values else [*found.masks.get(name, []), masked]
        if plan.parts["rotation"]:
            # nothing that was zero before is so in another basis
            found.masks, found.rotated = {}, True
            if found.model is not None:
                rotate_model(found.model, {name: stored.read() for name, stored in plan.parts["rotation"].items()})
        removed = {group: plan.removed(group) for group in plan.groups}
        for group, units in plan.groups.items():
            if found.units.get(group, units) != units:
                finding.add(f"{plan.folder.name} cuts {group} with {units} units, but {found.units[group]} were left")
            found.units[group] = units - len(removed[group])
        if found.model is not None:
            _cut(found, plan, removed)
        if len(removed.get("layers", ())):
            _renumber(found, blocks, plan.groups["layers"], removed["layers"])
    return found


def _cut(found: Trace, plan: StoredPlan, removed: Mapping[str, Tensor]) -> None:
    assert found.model is not None
    anatomy = decoder_anatomy(found.model, heads=plan.head_unit)
    fitting = {name: gone for name, gone in removed.items() if name in anatomy}
    if any(anatomy[name].units != plan.groups[name] for name in fitting):
        found.model = None  # said by the check of the base model
        return
    removal = Removal.of(found.model, anatomy, fitting)
    for (name, dim), gone in removal.positions.items():
        kept = torch.ones(found.model.get_parameter(name).shape[dim], dtype=torch.bool)
        kept[gone] = False
        for masked in found.masks.get(name, ()):
            masked.cuts.append((dim, kept.nonzero().flatten()))
    remove_units(found.model, removal)


def _renumber(found: Trace, blocks: str, count: int, gone: Tensor) -> None:
    found.renamed = True
    left = [layer for layer in range(count) if layer not in set(gone.tolist())]
    new = {str(old): str(place) for place, old in enumerate(left)}
    found.masks = _renamed(found.masks, f"{blocks}.", new)
    found.units = {**_renamed(found.units, "layers.", new), "layers": len(left)}


def _renamed(entries: dict[str, Any], prefix: str, new: dict[str, str]) -> dict[str, Any]:
    renamed = {}
    for name, value in entries.items():
        layer, dot, rest = name.removeprefix(prefix).partition(".")
        if not name.startswith(prefix) or not layer.isdecimal():
            renamed[name] = value
        elif layer in new:
            renamed[f"{prefix}{new[layer]}{dot}{rest}"] = value
    return renamed


def blocks_of(model: PreTrainedModel) -> str:
    """The name of the list of decoder blocks."""
    return decoder_blocks(model)[0]
