"""Checks of a checkpoint against its plans, and of the plans against the base model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from secateur.models.decoders import decoder_anatomy
from secateur.models.fingerprint import fingerprint
from secateur.models.loading import load_tokenizer
from secateur.models.skeleton import Checkpoint
from secateur.models.sources import Source
from secateur.structure.lexicon import VOCABULARY
from secateur.verification.findings import Finding
from secateur.verification.plans import StoredPlan
from secateur.verification.trace import Trace

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def open_base(name: str | Path, trust_remote_code: bool = False) -> Source:
    """A safetensors folder is streamed; anything else is loaded as a whole. Raises what ``secateur.load`` raises."""
    from secateur.models.opening import open_source

    return open_source(name, trust_remote_code=trust_remote_code)[0]


def check_base(plan: StoredPlan, base: Source) -> Finding:
    """The first plan was made for this base model: the same shapes and the same weights."""
    finding = Finding("base model")
    mine, theirs = fingerprint(base), plan.document.provenance[0].model
    if mine.shapes != theirs.shapes:
        finding.add(f"the plan was made for {theirs.name}, and {mine.name} has other tensors or shapes")
    elif mine.weights != theirs.weights:
        finding.add(f"the plan was made for other weights of the same shapes than those of {mine.name}")
    finding.detail = f"the plan was made for {mine.name}"
    return finding


def check_units(checkpoint: Checkpoint, found: Trace, finding: Finding) -> None:
    """As many heads, neurons and blocks are left as the plans say; with the base model, every shape is the same."""
    anatomy = decoder_anatomy(checkpoint.model, heads=found.head_unit)
    for name, units in sorted(found.units.items()):
        if name not in anatomy and units:
            finding.add(f"the plan leaves {units} units of {name}, which the checkpoint doesn't have")
        elif name in anatomy and anatomy[name].units != units:
            finding.add(f"the plan leaves {units} units of {name}, the checkpoint has {anatomy[name].units}")
    if VOCABULARY in found.units:
        _check_tokenizer(checkpoint, found.units[VOCABULARY], finding)
    if found.model is not None and finding.ok:
        _compare_shapes(checkpoint.model, found.model, finding)
    finding.detail = f"{len(found.units)} groups have the units that the plan keeps"


def _check_tokenizer(checkpoint: Checkpoint, units: int, finding: Finding) -> None:
    """Every token of the folder's tokenizer has a row."""
    tokenizer = load_tokenizer(str(checkpoint.folder), False)
    highest = max(tokenizer.get_vocab().values(), default=-1) if tokenizer is not None else -1
    if highest >= units:
        finding.add(f"the tokenizer has ids up to {highest}, the plan leaves {units} tokens")


def _compare_shapes(ours: PreTrainedModel, planned: PreTrainedModel, finding: Finding) -> None:
    # biases that the plan adds are no part of the base model
    have, want = ({n: tuple(p.shape) for n, p in m.named_parameters()} for m in (ours, planned))
    for name, shape in sorted(want.items()):
        if have.get(name) != shape:
            finding.add(
                f"cut by the plan, {name} of the base model has shape {list(shape)}, the checkpoint's has another"
            )


def check_masks(checkpoint: Checkpoint, found: Trace, base: Source | None) -> Finding:
    """What the plan removes is zero, and what it keeps has the value that the plan, or else the base model, gives it.

    Without either, kept entries that are zero are counted: the dense model may have had zeros of its own.
    """
    finding = Finding("zeros")
    if not found.masks:
        finding.skipped = "the plan has no masks"
        return finding
    unknown, zeros = [], 0
    for name, masks in sorted(found.masks.items()):
        if name not in checkpoint.names:
            unknown.append(name)
            continue
        with finding.noting():
            weight = checkpoint.read(name)
            left = torch.ones(weight.shape, dtype=torch.bool)
            # from the last step back: what a later one removes has no value of an earlier one any more
            for masked in reversed(masks):
                untouched = len(masks) == 1 and not masked.cuts and not found.renamed and not found.rotated
                source = base if untouched and not found.trained else None
                mask, values = masked.expected()
                values = None if found.trained else values
                checked = _check_mask(name, weight, (mask, values), left, found, source, finding)
                if checked is None:
                    unknown.append(name)
                    break
                zeros += checked
                left = left & mask if mask.shape == left.shape else left
    finding.detail = f"{len(found.masks)} weights are zero where the plan says"
    if found.trained:
        finding.detail += "; what it keeps was trained afterwards and has values of its own"
    if zeros:
        finding.detail += f"; {zeros:,} entries that it keeps are zero too"
    if unknown:
        finding.detail += f"; {len(unknown)} were cut after masking and not checked (give the base model)"
        if len(unknown) == len(found.masks):
            finding.skipped = "the masks lie on weights that were cut afterwards: give the base model"
    return finding


def _check_mask(
    name: str,
    weight: Tensor,
    expected: tuple[Tensor, Tensor | None],
    left: Tensor,
    found: Trace,
    base: Source | None,
    finding: Finding,
) -> int | None:
    """The number of zeros among the kept entries; None when the weight was cut in a way that is not known.

    ``left`` are the entries that later steps leave.
    """
    mask, values = expected
    if mask.shape != weight.shape:
        if found.units and found.model is None:
            return None
        finding.add(f"{name} has shape {list(weight.shape)}, its mask {list(mask.shape)}")
        return 0
    wrong = int(torch.count_nonzero(weight[~mask]))
    if wrong:
        finding.add(f"{name}: {wrong} of {int((~mask).sum())} entries that the plan removes are not zero")
    if values is None and base is not None:
        values = base.tensor(name)
    if values is None:
        return int((weight[mask] == 0).sum())
    kept = mask & left
    other = int((weight[kept] != values[kept].to(weight.dtype)).sum()) if values.shape == weight.shape else 0
    if other:
        finding.add(f"{name}: {other} of {int(kept.sum())} entries that the plan keeps have another value")
    return 0
