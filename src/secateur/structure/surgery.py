"""Cutting tensors: the part of surgery that knows nothing of architectures."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from secateur.structure.anatomy import Group


def removed_positions(groups: Iterable[Group], removed: Mapping[str, Tensor]) -> dict[tuple[str, int], Tensor]:
    """(tensor, dim) → positions along dim that leave, for the removed units of every group."""
    gone: dict[tuple[str, int], list[Tensor]] = defaultdict(list)
    for group in groups:
        units = removed.get(group.name)
        if units is not None and len(units):
            for part in group.slices:
                gone[part.tensor, part.dim].append(part.index[units].flatten())
    return {place: torch.cat(parts) for place, parts in gone.items()}


def complement(kept: Tensor, units: int) -> Tensor:
    """The other ones of so many units, ascending int64."""
    gone = torch.ones(units, dtype=torch.bool)
    gone[kept] = False
    return gone.nonzero().flatten()


def cut_positions(tensor: Tensor, name: str, positions: Mapping[tuple[str, int], Tensor]) -> Tensor:
    """The tensor without the positions that leave along each of its dimensions; itself when there are none."""
    for dim in range(tensor.dim()):
        gone = positions.get((name, dim))
        if gone is not None:
            kept = torch.ones(tensor.shape[dim], dtype=torch.bool)
            kept[gone] = False
            tensor = tensor.index_select(dim, kept.nonzero().flatten().to(tensor.device))
    return tensor


def zero_positions(tensor: Tensor, name: str, positions: Mapping[tuple[str, int], Tensor]) -> Tensor:
    """The tensor with zeros at those positions instead: the reference that a cut is tested against."""
    for dim in range(tensor.dim()):
        gone = positions.get((name, dim))
        if gone is not None:
            tensor = tensor.index_fill(dim, gone.to(tensor.device), 0)
    return tensor


def set_parameter(model: nn.Module, name: str, value: Tensor) -> None:
    """Put ``value`` in place of a parameter, or create it, and bring the sizes that its module states in line."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    old = getattr(module, leaf, None)
    trainable = old.requires_grad if isinstance(old, nn.Parameter) else True
    if old is None and leaf in module._parameters:
        del module._parameters[leaf]
    setattr(module, leaf, nn.Parameter(value, requires_grad=trainable))
    if leaf == "weight" and value.dim() == 2:
        _state_sizes(module, value)


def _state_sizes(module: nn.Module, weight: Tensor) -> None:
    rows, columns = weight.shape
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = rows, columns
    elif hasattr(module, "nf"):  # Conv1D stores [inputs, outputs]
        module.nx, module.nf = rows, columns  # type: ignore[assignment]
