"""Several budgets of a decoder at once: what they cost, and what variants of its groups lose.

A variant is a group with fewer units, all other groups whole. It is put into the dense model, with what the method
makes up for it, and its loss is the KL divergence of its predictions from those of the dense model on calibration
tokens. All variants go through the blocks together: each block is opened once, so a checkpoint may be larger than
memory, and a variant costs only the blocks behind its own.

Source: A. Bercovich et al., "Puzzle", arXiv:2411.19146, §3: replace-one-block scores, by KL divergence.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from secateur.allocate import Budget, ProgrammeAllocator, measured_losses, score_losses
from secateur.allocate.units import Limits, bundles, kept_units, least_bundles
from secateur.criteria.divergence import Divergence
from secateur.errors import BudgetError, CorruptFileError, UsageError
from secateur.files import write_text
from secateur.latencytable import LatencyTable
from secateur.models.latency import measure_decoder
from secateur.observe.activations import Activations
from secateur.observe.driver import BlockWalk
from secateur.provenance import BudgetAccount
from secateur.reading import read_json
from secateur.timing import Workload

if TYPE_CHECKING:
    from secateur.methods import UnitMethod
    from secateur.models.sources import Source
    from secateur.structure import Anatomy, Group

Progress = Callable[[str, int, int], None]
VariantBlock = Callable[[nn.Module, "Group", Tensor], None]
"""Takes the working copy of a block, a group, and the units that stay of it, and cuts the copy."""

SHARES = (7 / 8, 3 / 4, 1 / 2, 1 / 4)
"""Shares of the neurons that variants keep, beside the least number; heads are measured one by one up to so many."""
HIDDEN_BYTES = 2**31
"""Hidden states of variants that take more than this go to a file."""


@dataclass(frozen=True)
class Budgets:
    """The budgets that a method was asked to meet, and what the plan should say about them."""

    budgets: tuple[Budget, ...]
    notes: tuple[str, ...]
    uniform: bool
    per_parameter: bool
    """Whether units of unequal size compete on the scores of the method as they are."""

    @classmethod
    def of(
        cls, method: UnitMethod, anatomy: Anatomy, source: Source, latency_table: Path | None, progress: Progress
    ) -> Budgets:
        """Counts and, for latency, measures. Raises UsageError for a latency table that won't do or isn't needed."""
        if latency_table is not None and "latency" not in method.asked:
            raise UsageError(f"a latency table is for a budget of latency, got budget {method.budget}")
        found, notes = [], []
        for name, fraction in method.asked.items():
            if name != "latency":
                found.append(_counted(name, fraction, anatomy, method.kinds))
                continue
            table = LatencyTable.open(latency_table) if latency_table is not None else LatencyTable.cached()
            latency = measure_decoder(source, anatomy, Workload.parse(method.workload), table, progress)
            saved = {g.name: latency.saved(g) for g in anatomy.of_kind(*method.kinds)}
            found.append(Budget(name, fraction, latency.dense, saved, "ms"))
            notes.append(f"latency: {latency.about}")
            if table.difference:
                notes.append(f"the latencies were measured on another machine ({table.difference}) and hold there")
        return cls(tuple(found), tuple(notes), method.uniform, method.descriptor.allocation == "global")

    def check(self, groups: Sequence[Group], limits: Limits) -> None:
        """Raises BudgetError when they can't be met, whatever the scores are."""
        ProgrammeAllocator(self.budgets, lambda *_: np.zeros(0), self.uniform).check(groups, limits)

    def allocator(
        self, scores: Mapping[str, Tensor], measured: Mapping[str, Mapping[int, float]] | None
    ) -> ProgrammeAllocator:
        """Goes by the losses of ``measure_variants``, or without them by scores."""
        if measured is not None:
            losses = measured_losses(measured)
        else:
            losses = score_losses(scores, per_parameter=self.per_parameter)
        return ProgrammeAllocator(self.budgets, losses, self.uniform)

    def account(self, kept: Mapping[str, Tensor], groups: Sequence[Group]) -> dict[str, BudgetAccount]:
        """What was asked and what is expected with these units, by budget."""
        saved = {b.name: sum(float(b.saved[g.name][len(kept[g.name])]) for g in groups) for b in self.budgets}
        return {
            b.name: BudgetAccount(asked=b.fraction, dense=b.dense, pruned=b.dense - saved[b.name], unit=b.unit)
            for b in self.budgets
        }


def _counted(name: str, fraction: float, anatomy: Anatomy, kinds: Sequence[str]) -> Budget:
    """A budget of something that can be counted: parameters, MACs and bytes of the blocks, or bytes of the KV cache.

    Raises BudgetError where the model has nothing of it.
    """
    units = {"params": "parameters", "macs": "MACs", "bytes": "bytes", "kv_bytes": "bytes/token", "neurons": "neurons"}
    own = {
        "kv_bytes": sum(g.cost.kv_bytes * g.units for g in anatomy if g.kind == "kv_head"),
        "neurons": sum(g.units for g in anatomy.of_kind("neuron")),
    }
    dense = own[name] if name in own else getattr(anatomy.blocks, name)
    if not dense:
        raise BudgetError(f"the model has no {'KV cache' if name == 'kv_bytes' else units[name]} to shrink")
    saved = {
        g.name: float(getattr(g.cost, name, 1)) * np.arange(g.units, -1, -1, dtype=np.float64)
        for g in anatomy.of_kind(*kinds)
    }
    return Budget(name, fraction, float(dense), saved, units[name])


def variants_of(group: Group, scores_U: Tensor, limits: Limits) -> dict[int, Tensor]:
    """Number of kept units → the units, for the variants that are measured."""
    ordered = bundles(group, scores_U, limits)
    least = least_bundles(group, ordered, limits)
    if len(ordered) - least <= len(SHARES):
        counts = range(least, len(ordered))
    else:
        counts = sorted({least, *(max(least, round(share * len(ordered))) for share in SHARES)})
    kept = (kept_units(ordered[:count], [group])[group.name] for count in counts)
    return {len(units): units for units in kept}


def measure_variants(
    source: Source,
    ids: Tensor,
    variants: Mapping[str, Mapping[int, Tensor]],
    groups: Sequence[Group],
    cut: VariantBlock,
    *,
    dtype: torch.dtype,
    progress: Progress,
) -> dict[str, dict[int, float]]:
    """KL divergence from the dense model in nats per token, of every variant: group → kept units → loss.

    ``ids`` is [windows, length] int64; all windows go through together.
    """
    walk = BlockWalk(source, ids, dtype=dtype, batch_tokens=ids.numel())
    blocks = len(source.blocks)
    born: list[tuple[str, int]] = []
    hidden = Activations(limit=HIDDEN_BYTES)
    for layer in range(blocks):
        block = walk.open(layer)
        before = walk.hidden[0]
        for i in range(len(hidden)):
            hidden[i] = walk.run(block, layer, 0, hidden[i])
        hidden.turn()
        fresh = [(g, kept, units) for g in groups if g.layer == layer for kept, units in variants[g.name].items()]
        for group, kept, units in fresh:
            narrow = walk.open(layer)
            cut(narrow, group, units)
            hidden.append(walk.run(narrow, layer, 0, before))
            born.append((group.name, kept))
            del narrow
        walk.advance(block, layer)
        progress("variants", layer + 1, blocks + 1)
    head = source.shell(dtype, whole=True)
    divergence = Divergence(walk.logits(head, 0, walk.hidden[0]))
    found: dict[str, dict[int, float]] = {g.name: {} for g in groups}
    for i, (name, kept) in enumerate(born):
        found[name][kept] = divergence.of(walk.logits(head, 0, hidden[i]))
    progress("variants", blocks + 1, blocks + 1)
    return found


def windows_for(ids: Tensor, tokens: int) -> Tensor:
    """The first windows that hold about so many tokens, at least one, a window cut where it alone is longer."""
    return ids[: max(1, tokens // ids.shape[1]), :tokens]


def variants_file(
    folder: Path | None, ids: Tensor, variants: Mapping[str, Mapping[int, Tensor]], how: object
) -> Path | None:
    """Where losses of these variants on these tokens are kept in a folder of statistics; ``how`` names the method."""
    if folder is None:
        return None
    digest = hashlib.sha256(json.dumps(how, sort_keys=True, default=str).encode())
    digest.update(ids.cpu().numpy().tobytes())
    for name, by_size in variants.items():
        for units in by_size.values():
            digest.update(name.encode() + units.numpy().tobytes())
    return folder / f"variants-{digest.hexdigest()[:16]}.json"


def read_losses(path: Path | None) -> dict[str, dict[int, float]] | None:
    """Losses that were kept, or None. Raises CorruptFileError."""
    if path is None or not path.is_file():
        return None
    document = read_json(path, CorruptFileError)
    return {name: {int(kept): float(loss) for kept, loss in losses.items()} for name, losses in document.items()}


def write_losses(path: Path, losses: Mapping[str, Mapping[int, float]]) -> None:
    """Keep losses of variants. Raises OutputError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(losses) + "\n")
