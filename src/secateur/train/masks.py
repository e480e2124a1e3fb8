"""The masks that plans lay on a decoder that is trained after it was cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from secateur.errors import PlanMismatchError
from secateur.models.decoders import decoder_anatomy, decoder_blocks, is_linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from secateur.plans import Plan


def masks_of(plan: Plan | None, model: PreTrainedModel) -> Mapping[str, Tensor]:
    """The masks that ``plan`` lays on ``model``, which it has been applied to; boolean, in the shapes of ``model``.

    New values of weights that have lost units are no masks.
    Raises PlanMismatchError when names, shapes or widths are others, or when a plan cuts and masks at once.
    """
    if plan is None:
        return {}
    masks: Mapping[str, Tensor] = plan.masks
    if plan.keep:
        masks = {name: mask for name, mask in masks.items() if not plan.refits(name)}
    if _cuts(plan) and masks:
        raise PlanMismatchError(
            "the plan cuts units and masks weights at once, so its masks have the shapes of the uncut model:"
            " apply one plan that cuts, then make the one that masks"
        )
    _check_widths(plan, model)
    weights = dict(model.named_parameters())
    for name, mask in masks.items():
        found = list(weights[name].shape) if name in weights else None
        if found != list(mask.shape):
            there = f"has shape {found} here" if found else "is no weight of this model"
            raise PlanMismatchError(
                f"the plan was made for {plan.model.name} and doesn't fit this model: it masks {name}"
                f" of shape {list(mask.shape)}, which {there}"
            )
    return masks


def masks_left(plans: Sequence[Plan], model: PreTrainedModel, *, keep_zeros: bool = False) -> Mapping[str, Tensor]:
    """What must stay zero in ``model``, to which all ``plans`` have been applied; boolean, True = kept.

    Where the last plan is the only one that masks, and it doesn't cut, it says it itself. Where masks were cut
    afterwards, or a later plan masked again, whatever is zero now in the matrices of the blocks stays zero; with
    ``keep_zeros`` that is so without any plan. Raises PlanMismatchError when the last plan doesn't fit.
    """
    masking = [plan for plan in plans if any(not plan.refits(name) for name in plan.masks)]
    if masking and masking[0] is plans[-1] and not keep_zeros and not _cuts(plans[-1]):
        return masks_of(plans[-1], model)
    if not (masking or keep_zeros):
        return {}
    found = {name: weight != 0 for name, weight in _matrices(model).items()}
    return {name: mask for name, mask in found.items() if not bool(mask.all())}


def _cuts(plan: Plan) -> bool:
    return any(len(kept) < plan.groups[name] for name, kept in plan.keep.items())


def zeros_left(model: PreTrainedModel) -> float:
    """The fraction of the linear weights of the blocks that is zero, 0..1."""
    matrices = _matrices(model).values()
    zeros = sum(weight.numel() - int(torch.count_nonzero(weight)) for weight in matrices)
    return zeros / max(1, sum(weight.numel() for weight in matrices))


def _matrices(model: PreTrainedModel) -> dict[str, Tensor]:
    """The linear weights of the blocks by name."""
    name, blocks = decoder_blocks(model)
    names = [f"{name}.{path}.weight" for path, module in blocks.named_modules() if is_linear(module)]
    return {name: model.get_parameter(name).detach() for name in names}


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
