"""Plans for tiny models, without tokenizers or text."""

from __future__ import annotations

from typing import Any

import torch

from secateur.allocators import chosen_allocation
from secateur.engine import decide
from secateur.methods import make_method, settled
from secateur.models.fingerprint import fingerprint
from secateur.models.sources import Source
from secateur.observe.calibration import Tokens
from secateur.plans import Plan
from secateur.provenance import CalibrationInfo, Provenance

# a small search or training, where models are tiny: what it finds is looked at elsewhere
QUICK: dict[str, dict[str, Any]] = {
    "tyr": {"levels": 3, "iterations": 1, "generations": 1, "offspring": 2},
    "icbs": {"block": 64, "batch": 2},
    "loraprune": {"steps": 4, "every": 1, "batch": 2},
    "adapt_pruner": {"steps": 4},
    "prunenet": {"episodes": 2},
}


def tokens_of(ids: torch.Tensor) -> Tokens:
    """Calibration windows from ids, [windows, length] int64."""
    info = CalibrationInfo(
        source="ids", samples=ids.shape[0], length=ids.shape[1], tokens=ids.numel(), seed=0, sha256="0" * 64
    )
    return Tokens(ids=ids, info=info)


def plan_for(method: str, model: Any, ids: torch.Tensor, *, dtype: torch.dtype = torch.float32, **options: Any) -> Plan:
    """The plan of ``method`` with these options, calibrated on ``ids``; ``spread`` names an allocator."""
    spread = options.pop("spread", None)
    chosen, spread = settled(make_method(method, {**QUICK.get(method, {}), **options}), spread)
    allocation = chosen_allocation(spread, chosen)
    steps: list[tuple[str, int, int]] = []
    keeper = decide(
        chosen,
        Source(model),
        tokens_of(ids),
        dtype=dtype,
        batch_tokens=2 * ids.shape[1],
        progress=lambda *step: steps.append(step),
        allocator=allocation.allocator if allocation else None,
    )
    decision = keeper.whole
    provenance = Provenance(
        method=chosen.name,
        options=chosen.options(),
        model=fingerprint(Source(model)),
        allocation=allocation.provenance if allocation else None,
        notes=tuple(decision.notes),
    ).allocated(keeper.allocated())
    parts = {k: getattr(decision, k) for k in ("groups", "keep", "masks", "values", "biases", "scores", "rotations")}
    return Plan(provenance=(provenance,), **parts)
