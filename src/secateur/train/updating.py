"""One update of all masks: the lowest scores leave until the sparsity is reached, then some weights are exchanged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from secateur.allocate import NofM, highest_live, keep_highest
from secateur.errors import NonFiniteError, UsageError
from secateur.methods import Blocks, Trained, TrainingMethod
from secateur.train.weights import Layer

Masks = dict[str, Tensor]
Reduce = Callable[[Tensor], Tensor]
"""The mean of a tensor over ranks."""


@dataclass(frozen=True)
class Update:
    """What an update did: the sparsity that was asked for and the one that there is, and how many were exchanged."""

    step: int
    target: float
    sparsity: float
    exchanged: int


def random_mask(part: Trained, count: int) -> Tensor:
    """A mask before the first step with so many live weights, drawn at random."""
    return highest_live(part.uniform("start").reshape(-1), count).reshape(part.weight.shape)


def scored(parts: Mapping[str, Trained], score: Callable[[Trained], Tensor], reduce: Reduce, what: str) -> Masks:
    """Scores by name, those of dead weights among them. Raises NonFiniteError."""
    found = {}
    for name, part in parts.items():
        scores = reduce(score(part))
        bad = int((~torch.isfinite(scores)).sum())
        if bad:
            raise NonFiniteError(
                f"{name}: {bad} of {scores.numel()} {what} are NaN or inf at step {part.step}; look at the loss and the"
                " learning rate"
            )
        found[name] = scores
    return found


def thinned(
    method: TrainingMethod,
    layers: Mapping[str, Layer],
    parts: Mapping[str, Trained],
    scores: Masks,
    sparsity: float,
    least: float = 0.0,
) -> Masks:
    """Masks with so much sparsity: of live weights, those with the lowest scores leave.

    The method's floor, but at least the fraction ``least``, stays of every one.
    """
    ranked = {name: scores[name].masked_fill(~part.mask, -torch.inf) for name, part in parts.items()}
    if method.run_length():
        n, m = int(sparsity * method.run_length() + 1e-6), method.run_length()
        return {name: _pattern(layers[name], ranked[name], n, m) & part.mask for name, part in parts.items()}
    blocks = method.blocks()
    if blocks is not None:
        ranked = {name: _pooled(name, scores[name], part.mask, blocks) for name, part in parts.items()}
    kept = keep_highest(ranked, sparsity, scope=method.competition(), floor=max(method.floor, least))
    if blocks is None:
        return kept
    return {name: _spread(mask, blocks, parts[name].mask.shape) & parts[name].mask for name, mask in kept.items()}


def decides_alone(method: TrainingMethod) -> bool:
    """Whether the mask of a layer follows from that layer, so that one at a time will do."""
    return method.competition() == "uniform" and method.shares({}) is None


def exchanged(
    method: TrainingMethod, parts: Mapping[str, Trained], masks: Masks, scores: Masks, step: int, reduce: Reduce
) -> tuple[Masks, int]:
    """(masks with as many live weights, how many of them are others): the lowest leave, others grow."""
    rate = method.rate(step)
    now = {name: replace(part, mask=masks[name]) for name, part in parts.items()}
    counts = method.exchanged_counts(now, rate)
    if not any(counts.values()):
        return masks, 0
    staying = {
        name: highest_live(
            scores[name].masked_fill(~mask, -torch.inf).reshape(-1), int(mask.sum()) - counts[name]
        ).reshape(mask.shape)
        for name, mask in masks.items()
    }
    growing = scored(parts, method.growing, reduce, "growth scores")
    shares = method.shares(now)
    if shares is not None:
        room = {name: mask.numel() - int(mask.sum()) for name, mask in staying.items()}
        counts = shared_out(sum(counts.values()), shares, room)
    found = {}
    for name, mask in staying.items():
        order = growing[name].masked_fill(mask, -torch.inf).reshape(-1)
        found[name] = mask | highest_live(order, counts[name]).reshape(mask.shape)
    return found, sum(int((found[name] & ~mask).sum()) for name, mask in masks.items())


def shared_out(total: int, shares: Mapping[str, float], room: Mapping[str, int]) -> dict[str, int]:
    """``total`` in whole numbers in proportion to ``shares``, each at most its ``room``; others take the rest."""
    names = list(shares)
    wish, most = np.array([shares[n] for n in names], dtype=np.float64), np.array([room[n] for n in names])
    counts = np.zeros(len(names), dtype=np.int64)
    while (left := total - int(counts.sum())) > 0:
        free = counts < most
        weight = np.where(free, wish, 0.0)
        if weight.sum() == 0:
            weight = free.astype(np.float64)
        part = left * weight / weight.sum()
        given = np.floor(part).astype(np.int64)
        # the largest remainders make up the sum
        for i in np.argsort(-(part - given), kind="stable")[: left - int(given.sum())]:
            given[i] += 1
        counts += np.minimum(given, most - counts)
    return dict(zip(names, counts.tolist(), strict=True))


def _pattern(layer: Layer, scores: Tensor, n: int, m: int) -> Tensor:
    if layer.read % m:
        raise UsageError(
            f"{layer.name} has {layer.read} inputs, which is no multiple of {m} as the pattern needs: leave it out with"
            f" exclude=['{layer.name}']"
        )
    return layer.unrows(NofM(n, m).keep(layer.rows(scores))) if n else torch.ones_like(scores, dtype=torch.bool)


def _pooled(name: str, scores: Tensor, mask: Tensor, blocks: Blocks) -> Tensor:
    """The score of every block, -inf where nothing of it lives; the blocks at the edges may be smaller."""
    if scores.dim() != 2:
        raise UsageError(
            f"{name} has {scores.dim()} dimensions, and blocks are for matrices: leave it out with exclude=['{name}']"
        )
    size = (blocks.rows, blocks.columns)
    if blocks.pooling == "avg":
        found = F.avg_pool2d(scores[None], size, size, ceil_mode=True, count_include_pad=False)[0]
    else:
        found = F.max_pool2d(scores[None], size, size, ceil_mode=True)[0]
    alive = F.max_pool2d(mask[None].to(scores), size, size, ceil_mode=True)[0]
    return found.masked_fill(alive == 0, -torch.inf)


def _spread(mask: Tensor, blocks: Blocks, shape: torch.Size) -> Tensor:
    whole = mask.repeat_interleave(blocks.rows, 0).repeat_interleave(blocks.columns, 1)
    return whole[: shape[0], : shape[1]]
