"""The straight line between two trained networks: does the loss rise on the way, and how far apart are they?

    E(alpha) = E(alpha * W_1 + (1 - alpha) * W_2),  alpha in [0, 1]
    barrier  = max E(alpha) - (E(W_1) + E(W_2)) / 2

Statistics of batch norms belong to the weights that they were taken with, so they are taken again at every point of the
line (`recompute`), or interpolated as well. Permutations of neurons are not undone.

Source: J. Frankle et al., "Linear mode connectivity and the lottery ticket hypothesis", ICML 2020, arXiv:1912.05671;
distances from "Stabilizing the lottery ticket hypothesis", arXiv:1903.01611.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from secateur.errors import DataError, NonFiniteError, UsageError
from secateur.rounds.run import EvaluateFunction, numbers
from secateur.structure.exporting import evaluation_mode
from secateur.tensorfiles import tensors_of

STATISTICS = ("recompute", "interpolate")
_HIGHER = ("accuracy", "auc", "f1", "bleu")


@dataclass(frozen=True)
class Curve:
    """One number along the line: ``values`` at ``alphas``, from the second network (0) to the first (1)."""

    metric: str
    alphas: tuple[float, ...]
    values: tuple[float, ...]
    higher_is_better: bool

    @property
    def ends(self) -> float:
        """Mean of both networks."""
        return (self.values[0] + self.values[-1]) / 2

    @property
    def worst(self) -> float:
        """The worst value on the line."""
        return min(self.values) if self.higher_is_better else max(self.values)

    @property
    def barrier(self) -> float:
        """How much worse the worst point is than the mean of both networks, in the unit of the metric; at least 0 but
        for networks of which one is worse than the other and all of the line."""
        return self.ends - self.worst if self.higher_is_better else self.worst - self.ends


@dataclass(frozen=True)
class Distance:
    """Euclidean distance and angle (radians, 0 to pi) between two networks."""

    l2: float
    angle: float


def interpolate(first: Mapping[str, Tensor], second: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """``alpha * first + (1 - alpha) * second`` of floating-point tensors; others are those of the first.

    At 0 and 1 it is one of both to the bit. Raises UsageError when names or shapes differ.
    """
    _check_alike(first, second)
    return {name: _between(tensor, second[name], alpha) for name, tensor in first.items()}


def distance(
    first: Mapping[str, Tensor], second: Mapping[str, Tensor], masks: Mapping[str, Tensor] | None = None
) -> Distance:
    """Between the floating-point tensors of both, or between the entries that ``masks`` (boolean, by name) keep."""
    _check_alike(first, second)
    names = list(masks) if masks is not None else [n for n, t in first.items() if t.is_floating_point()]
    one, two = (
        torch.cat([_entries(s[n], masks[n] if masks is not None else None) for n in names]) for s in (first, second)
    )
    norms = float(one.norm() * two.norm())
    cosine = float(one @ two) / norms if norms else 1.0
    # what is the same vector but for rounding
    angle = 0.0 if torch.equal(one, two) else math.acos(min(1.0, max(-1.0, cosine)))
    return Distance(float((one - two).norm()), angle)


def connect(
    first: nn.Module,
    second: nn.Module,
    evaluate: EvaluateFunction,
    *,
    points: int = 30,
    statistics: str = "recompute",
    data: Iterable[Any] | None = None,
    higher_is_better: Mapping[str, bool] | None = None,
) -> dict[str, Curve]:
    """Curves by metric along the line between two networks of one kind, at so many evenly spaced points, ends included.

    ``statistics`` of batch norms are taken again at every point on ``data``, batches whose first part goes in
    (``recompute``), or are interpolated too. Numbers called accuracy count as better when they are higher, others when
    lower, unless ``higher_is_better`` says it. The networks stay as they are.
    Raises UsageError, DataError without batches for norms that need them, NonFiniteError.
    """
    if points < 2:
        raise UsageError(f"points must be at least 2, for both ends of the line, got {points}")
    if statistics not in STATISTICS:
        raise UsageError(f"statistics must be one of {', '.join(STATISTICS)}, got '{statistics}'")
    one, other = ({name: t.detach().clone() for name, t in tensors_of(module).items()} for module in (first, second))
    between = copy.deepcopy(first)
    norms = [m for m in between.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    batches = list(data) if data is not None and norms and statistics == "recompute" else []
    if norms and statistics == "recompute" and not batches:
        raise DataError(
            "the network has batch norms, whose statistics are taken again at every point: give data= (batches of the"
            " training), or statistics='interpolate'"
        )
    alphas = [point / (points - 1) for point in range(points)]
    found: dict[str, list[float]] = {}
    for alpha in alphas:
        _fill(between, interpolate(one, other, alpha))
        if batches:
            recompute_statistics(between, norms, batches)
        with evaluation_mode(between), torch.no_grad():
            for name, value in numbers(evaluate(between)).items():
                if not math.isfinite(value):
                    raise NonFiniteError(f"{name} is {value} at alpha {alpha:.3g} between the networks")
                found.setdefault(name, []).append(value)
    return {
        name: Curve(name, tuple(alphas), tuple(values), _is_higher_better(name, higher_is_better))
        for name, values in found.items()
    }


def recompute_statistics(model: nn.Module, norms: Sequence[_BatchNorm], batches: Iterable[Any]) -> None:
    """Means and variances of batch norms on these batches, each with the same weight; all else in evaluation mode."""
    device = next(model.parameters()).device
    with evaluation_mode(model), _averaging(norms), torch.no_grad():
        for batch in batches:
            inputs = batch[0] if isinstance(batch, list | tuple) else batch
            model(**{k: v.to(device) for k, v in inputs.items()}) if isinstance(inputs, Mapping) else model(
                inputs.to(device)
            )


@contextmanager
def _averaging(norms: Sequence[_BatchNorm]) -> Iterator[None]:
    before = [(norm, norm.momentum) for norm in norms]
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
        yield
    finally:
        for norm, momentum in before:
            norm.momentum = momentum


def _between(first: Tensor, second: Tensor, alpha: float) -> Tensor:
    if not first.is_floating_point() or alpha == 1:
        return first
    if alpha == 0:
        return second
    return alpha * first + (1 - alpha) * second


def _fill(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in tensors_of(module).items():
            tensor.copy_(tensors[name])


def _entries(tensor: Tensor, mask: Tensor | None) -> Tensor:
    flat = tensor.detach().double().cpu()
    return flat.reshape(-1) if mask is None else flat[mask.cpu()]


def _check_alike(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    other = sorted(
        n for n in {*first, *second} if n not in first or n not in second or first[n].shape != second[n].shape
    )
    if other:
        raise UsageError(f"the networks aren't of one kind: {other[0]} isn't the same in both")


def _is_higher_better(name: str, told: Mapping[str, bool] | None) -> bool:
    if told is not None and name in told:
        return told[name]
    return any(word in name.lower() for word in _HIGHER)
