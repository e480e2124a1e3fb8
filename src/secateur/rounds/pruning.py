"""Which weights leave after a training: masks from masks, trained weights and what the method says."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.allocate import fewest_kept, highest_live
from secateur.methods import Contest, RoundsMethod, Trained
from secateur.train.updating import Masks, scored
from secateur.train.weights import Layer


def parts_of(
    layers: Mapping[str, Layer],
    kinds: Mapping[str, str],
    weights: Mapping[str, Tensor],
    masks: Masks,
    level: int,
    seed: int,
) -> dict[str, Trained]:
    """Trained weights as methods see them."""
    return {
        name: Trained(name, _wide(weights[name]), masks[name], step=level, seed=seed, kind=kinds[name])
        for name in layers
    }


def next_masks(method: RoundsMethod, layers: Mapping[str, Layer], parts: Mapping[str, Trained]) -> Masks:
    """Masks of the next level, within those of this one. Raises NonFiniteError; warns of layers that are emptied."""
    scores = scored(parts, method.score, lambda tensor: tensor, "scores")
    found: Masks = {}
    for field in _fields(method, layers, parts):
        found |= field.split(_kept(method, field, {name: scores[name] for name in field.names}, parts))
    empty = [name for name, mask in found.items() if bool(parts[name].mask.any()) and not bool(mask.any())]
    if empty:
        warnings.warn(
            f"nothing is left of {', '.join(empty)} at level {parts[empty[0]].step + 1}, so that nothing passes there:"
            " floor=0.01 keeps that fraction of every layer",
            stacklevel=3,
        )
    return {name: found[name] for name in parts}


@dataclass(frozen=True)
class _Field:
    """Layers that compete, with or without their outputs apart."""

    kind: Hashable
    layers: Sequence[Layer]
    apart: bool

    @property
    def names(self) -> list[str]:
        return [layer.name for layer in self.layers]

    def joined(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Entries of all layers as a matrix, one row for all or one per output."""
        if self.apart:
            return self._outputs(tensors[self.layers[0].name])
        return torch.cat([tensors[name].reshape(-1) for name in self.names])[None]

    def split(self, matrix: Tensor) -> dict[str, Tensor]:
        """Inverse of ``joined``."""
        if self.apart:
            [layer] = self.layers
            shape = self._outputs_first(torch.empty(layer.weight.shape, device="meta")).shape
            return {layer.name: self._outputs_first(matrix.reshape(shape))}
        sizes = [layer.weight.numel() for layer in self.layers]
        pieces = matrix[0].split(sizes)
        return {layer.name: piece.reshape(layer.weight.shape) for layer, piece in zip(self.layers, pieces, strict=True)}

    def _outputs_first(self, tensor: Tensor) -> Tensor:
        # outputs are the dimension that isn't the inputs', of the first two; a swap is its own inverse
        return tensor.transpose(0, 1) if self.layers[0].inputs == 0 else tensor

    def _outputs(self, tensor: Tensor) -> Tensor:
        return self._outputs_first(tensor).flatten(1)


def _fields(method: RoundsMethod, layers: Mapping[str, Layer], parts: Mapping[str, Trained]) -> Iterator[_Field]:
    if method.scope == "global":
        together: dict[Hashable, list[Layer]] = {}
        for name, part in parts.items():
            together.setdefault(method.kind(part), []).append(layers[name])
        for kind, members in together.items():
            yield _Field(kind, members, False)
        return
    for name, part in parts.items():
        yield _Field(method.kind(part), [layers[name]], method.scope == "neuron")


def _kept(method: RoundsMethod, field: _Field, scores: Mapping[str, Tensor], parts: Mapping[str, Trained]) -> Tensor:
    mask_UW = field.joined({name: parts[name].mask for name in field.names})
    contest = Contest(field.kind, field.joined({name: parts[name].weight for name in field.names}), mask_UW)
    staying_U = contest.live_U - method.leaving(contest).to(mask_UW.device)
    scores_UW = field.joined(scores).masked_fill(~mask_UW, -torch.inf)
    if method.floor:
        least_UW = field.joined(_least(method, scores, parts))
        scores_UW = scores_UW.masked_fill(least_UW, torch.inf)
        # the floors of all layers, or those of a row, may be more than what stays
        staying_U = torch.maximum(staying_U, least_UW.sum(dim=1))
    return highest_per_row(scores_UW, staying_U)


def _least(method: RoundsMethod, scores: Mapping[str, Tensor], parts: Mapping[str, Trained]) -> dict[str, Tensor]:
    """What stays of every layer whatever the others have."""
    found = {}
    for name, score in scores.items():
        live = score.masked_fill(~parts[name].mask, -torch.inf).reshape(-1)
        found[name] = highest_live(live, fewest_kept(len(live), 1.0 - method.floor)).reshape(score.shape)
    return found


def highest_per_row(scores_UW: Tensor, counts_U: Tensor) -> Tensor:
    """True for so many of the highest entries of every row, among equals the first; -inf never."""
    if len(scores_UW) == 1:
        return highest_live(scores_UW[0], int(counts_U))[None]
    order_UW = scores_UW.argsort(dim=1, descending=True, stable=True)
    places_UW = torch.arange(scores_UW.shape[1], device=scores_UW.device).expand_as(order_UW)
    rank_UW = torch.empty_like(order_UW).scatter_(1, order_UW, places_UW)
    return (rank_UW < counts_U[:, None]) & (scores_UW != -torch.inf)


def _wide(weight: Tensor) -> Tensor:
    return weight if weight.dtype == torch.float64 else weight.float()
