"""The plans of a checkpoint, read piece by piece: masks and values never meet in memory all at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.errors import CorruptFileError, PlanError
from secateur.finite import all_finite
from secateur.plans import KINDS, check_basis, read_document, units_apart, unpack_bits
from secateur.reading import check_links
from secateur.tensorfiles import Stored, read_header

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class StoredPlan:
    """One step: what plan.json says, and where the tensors of plan.safetensors lie, by kind and name."""

    folder: Path
    document: Any
    parts: Mapping[str, Mapping[str, Stored]]

    @property
    def head_unit(self) -> str:
        """``query`` or ``kv``, as in ``Plan.head_unit``."""
        return "query" if any(p.options.get("heads") == "query" for p in self.document.provenance) else "kv"

    @property
    def groups(self) -> Mapping[str, int]:
        """Dense number of units of every group that is cut."""
        return self.document.groups

    def removed(self, group: str) -> Tensor:
        """Units that leave, ascending int64."""
        gone = torch.ones(self.groups[group], dtype=torch.bool)
        gone[self.parts["keep"][group].read()] = False
        return gone.nonzero().flatten()

    def mask(self, name: str) -> Tensor:
        """Boolean, in the shape of the weight; True = kept."""
        return unpack_bits(self.parts["mask"][name].read(), self.document.masks[name])

    def values(self, name: str) -> Tensor | None:
        """The kept entries, row-major, where the plan sets them."""
        stored = self.parts["value"].get(name)
        return None if stored is None else stored.read()


def open_plan(folder: Path) -> StoredPlan:
    """A plan whose parts fit together as far as headers tell. Raises PlanError."""
    check_links(folder, PlanError)
    document = read_document(folder)
    path = folder / "plan.safetensors"
    try:
        header = read_header(path)
    except CorruptFileError as error:
        raise PlanError(str(error)) from None
    parts: dict[str, dict[str, Stored]] = {kind: {} for kind in KINDS}
    for name, stored in header.items():
        kind, _, rest = name.partition("/")
        if kind not in parts:
            raise PlanError(f"{path} holds an unknown entry {name!r}")
        parts[kind][rest] = stored
    for what, listed, there in (
        ("kept units", document.groups, parts["keep"]),
        ("masks", document.masks, parts["mask"]),
    ):
        if set(listed) != set(there):
            name = sorted(set(listed) ^ set(there))[0]
            raise PlanError(f"{folder}: plan.json and plan.safetensors disagree on the {what} of {name}")
    return StoredPlan(folder, document, parts)


def check_plan(plan: StoredPlan) -> None:
    """Look at every tensor of the plan, one after the other. Raises PlanError for the first that is malformed."""
    if len({p.model.shapes for p in plan.document.provenance}) != 1:
        raise PlanError(f"{plan.folder}: a plan must be made of parts for one model")
    for name, units in plan.groups.items():
        stored = plan.parts["keep"][name]
        if stored.dtype != torch.int64 or len(stored.shape) != 1:
            raise PlanError(f"kept units of {name} must be a list of integers")
        kept = stored.read()
        apart = units_apart(p.initialised for p in plan.document.provenance)
        if kept.numel() and (int(kept[0]) < 0 or int(kept[-1]) >= units or bool((kept.diff() < apart).any())):
            raise PlanError(f"kept units of {name} must be ascending and lie in [0, {units})")
    for name in plan.document.masks:
        ones = int(plan.mask(name).sum())
        values = plan.parts["value"].get(name)
        if values is not None and (values.dtype not in _FLOATS or values.numel != ones):
            raise PlanError(f"values of {name} don't match its mask")
    for name, stored in plan.parts["rotation"].items():
        check_basis(name, stored.read())
    for kind in ("value", "bias"):
        for name, stored in plan.parts[kind].items():
            if kind == "value" and name not in plan.document.masks:
                raise PlanError(f"values of {name} don't match its mask")
            if stored.dtype not in _FLOATS or not all_finite(stored.read()):
                raise PlanError(f"{'values' if kind == 'value' else 'the bias'} of {name} must be finite numbers")
