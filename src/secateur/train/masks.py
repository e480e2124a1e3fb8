"""Masks of sharded weights: a rank holds the bits of its own rows and nothing else.

Bits are packed along a row, never across rows, so that a mask is cut into shards at the same rows as its weight:
uint8 [rows, ceil(columns / 8)], least significant bit first, 1 = kept. A weight of more or fewer than two dimensions
counts as its first dimension times the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from secateur.errors import PlanMismatchError, UsageError
from secateur.models.decoders import decoder_anatomy, decoder_blocks, is_linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from secateur.plans import Plan


def pack_rows(mask: Tensor) -> Tensor:
    """Boolean mask of a weight → uint8 [rows, ceil(columns / 8)] on the CPU."""
    rows = mask.cpu().reshape(mask.shape[0], -1).numpy()
    return torch.from_numpy(np.packbits(rows, axis=1, bitorder="little"))


def unpack_rows(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Inverse of ``pack_rows``: boolean, of ``shape``, on the device of ``packed``."""
    rows, size = packed.shape
    bits = packed[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)
    columns = int(np.prod(shape[1:], dtype=np.int64))
    return (bits & 1).bool().reshape(rows, 8 * size)[:, :columns].reshape(shape)


def packed_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """The shape of the packed mask of a weight of ``shape``."""
    return shape[0], (int(np.prod(shape[1:], dtype=np.int64)) + 7) // 8


def shard_like(packed: Tensor, weight: Tensor) -> Tensor:
    """The part of a packed mask that belongs to this rank's part of ``weight``; every rank gives the whole mask.

    Raises UsageError for a weight that isn't sharded by rows.
    """
    if not isinstance(weight, DTensor):
        return packed.to(weight.device)
    for placement in weight.placements:
        if not (isinstance(placement, Replicate) or (isinstance(placement, Shard) and placement.dim == 0)):
            raise UsageError(f"a mask can follow a weight that is sharded by rows, not one placed as {placement}")
    # None: every rank cuts its own rows out of what it has, and nothing is sent
    return distribute_tensor(packed, weight.device_mesh, weight.placements, src_data_rank=None)


def local(tensor: Tensor) -> Tensor:
    """This rank's part, sharing memory with ``tensor``."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def clear_masked(tensor: Tensor, packed: Tensor) -> None:
    """Zero the masked entries of this rank's part of ``tensor``, in place, whatever they hold."""
    part = local(tensor)
    if part.numel():
        keep = unpack_rows(local(packed), tuple(part.shape))
        part.masked_fill_(~keep.to(part.device), 0)


def masks_of(plan: Plan | None, model: PreTrainedModel) -> Mapping[str, Tensor]:
    """The masks that ``plan`` lays on ``model``, which it has been applied to; boolean, in the shapes of ``model``.

    Raises PlanMismatchError when names, shapes or widths are others, or when a plan cuts and masks at once.
    """
    if plan is None:
        return {}
    cuts = any(len(kept) < plan.groups[name] for name, kept in plan.keep.items())
    if cuts and plan.masks:
        raise PlanMismatchError(
            "the plan cuts units and masks weights at once, so its masks have the shapes of the uncut model:"
            " apply one plan that cuts, then make the one that masks"
        )
    _check_widths(plan, model)
    weights = dict(model.named_parameters())
    for name, mask in plan.masks.items():
        found = list(weights[name].shape) if name in weights else None
        if found != list(mask.shape):
            there = f"has shape {found} here" if found else "is no weight of this model"
            raise PlanMismatchError(
                f"the plan was made for {plan.model.name} and doesn't fit this model: it masks {name}"
                f" of shape {list(mask.shape)}, which {there}"
            )
    return plan.masks


def masks_left(plans: Sequence[Plan], model: PreTrainedModel, *, keep_zeros: bool = False) -> Mapping[str, Tensor]:
    """What must stay zero in ``model``, to which all ``plans`` have been applied; boolean, True = kept.

    One plan that only masks says it itself. Where masks were cut afterwards, or a later plan masked again, whatever is
    zero now in the matrices of the blocks stays zero; with ``keep_zeros`` that is so without any plan.
    Raises PlanMismatchError when the one plan doesn't fit.
    """
    masking = [plan for plan in plans if plan.masks]
    if len(plans) == 1 and masking and not keep_zeros:
        plan = plans[0]
        if not any(len(kept) < plan.groups[name] for name, kept in plan.keep.items()):
            return masks_of(plan, model)
    if not (masking or keep_zeros):
        return {}
    name, blocks = decoder_blocks(model)
    weights = {f"{name}.{path}.weight": m.weight for path, m in blocks.named_modules() if is_linear(m)}
    found = {name: weight.detach() != 0 for name, weight in weights.items()}  # type: ignore[union-attr]
    return {name: mask for name, mask in found.items() if not bool(mask.all())}


def check_zero(model: PreTrainedModel, masks: Mapping[str, Tensor]) -> None:
    """Refuse a model to which the plan has not been applied. Raises PlanMismatchError."""
    for name, keep in masks.items():
        weight = model.get_parameter(name).detach()
        wrong = int(torch.count_nonzero(weight.masked_fill(keep.to(weight.device), 0)))
        if wrong:
            raise PlanMismatchError(
                f"{name} has {wrong} weights that the plan masks and that aren't zero:"
                " give the model that secateur.apply makes of this plan"
            )


def _check_widths(plan: Plan, model: PreTrainedModel) -> None:
    if not plan.keep:
        return
    anatomy = decoder_anatomy(model, heads=plan.head_unit)
    layers = plan.keep["layers"].tolist() if "layers" in plan.keep else range(plan.model.num_layers)
    moved = {old: new for new, old in enumerate(layers)}
    for name, kept in plan.keep.items():
        room, *place = name.split(".")
        if place and int(place[0]) not in moved:
            continue  # the whole block has gone
        here = ".".join([room, str(moved[int(place[0])]), *place[1:]]) if place else name
        units = anatomy[here].units if here in anatomy else 0
        if units != len(kept):
            raise PlanMismatchError(
                f"the plan keeps {len(kept)} units of {name}, and this model has {units} there:"
                " give the model that secateur.apply makes of this plan"
            )
