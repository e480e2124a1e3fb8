"""Which weights stay: who competes with whom, and how many of them win.

Law: a rule keeps exactly the number it states (ties go to the entries that come first in storage order being
removed first), and never keeps less for a smaller sparsity. O outputs, I inputs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from secateur.allocate.shares import part_of
from secateur.errors import OptionError, UsageError


class MaskRule(Protocol):
    """Scores [outputs, inputs], higher = keep → bool mask of the same shape, True = kept."""

    def keep(self, scores_OI: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class PerRow:
    """Every output row loses its floor(inputs * sparsity) lowest entries."""

    sparsity: float

    def keep(self, scores_OI: Tensor) -> Tensor:
        return ~_lowest(scores_OI, part_of(scores_OI.shape[1], self.sparsity))

    def step(self, shape: tuple[int, int]) -> int:
        """See ``WeightMethod.step``: every row loses one more."""
        return shape[0]


@dataclass(frozen=True)
class PerMatrix:
    """The matrix loses its floor(entries * sparsity) lowest entries.

    ``inclusive`` is the published rule: everything at or below the threshold sorted[floor(entries * sparsity)]
    leaves, which is one entry more, and every tie.
    """

    sparsity: float
    inclusive: bool = False

    def keep(self, scores_OI: Tensor) -> Tensor:
        count = part_of(scores_OI.numel(), self.sparsity)
        flat = scores_OI.reshape(1, -1)
        if self.inclusive:
            return (flat > kth_smallest(flat.flatten(), count)).reshape(scores_OI.shape)
        return ~_lowest(flat, count).reshape(scores_OI.shape)


@dataclass(frozen=True)
class NofM:
    """In every row, every run of ``m`` consecutive inputs loses its ``n`` lowest entries.

    Raises UsageError for a matrix whose inputs are not a multiple of ``m``.
    """

    n: int
    m: int

    @property
    def share(self) -> float:
        """The fraction that leaves."""
        return self.n / self.m

    def keep(self, scores_OI: Tensor) -> Tensor:
        rows, inputs = scores_OI.shape
        if inputs % self.m:
            raise UsageError(f"pattern {self.n}:{self.m} needs a multiple of {self.m} inputs, this matrix has {inputs}")
        return ~_lowest(scores_OI.reshape(-1, self.m), self.n).reshape(rows, inputs)


def parse_pattern(pattern: str) -> NofM:
    """``2:4`` → NofM(2, 4). Raises OptionError for anything else, and unless 0 < N < M."""
    match = re.fullmatch(r"(\d+):(\d+)", pattern.strip())
    if match is None or not 0 < int(match[1]) < int(match[2]):
        raise OptionError(f"pattern must be N:M with 0 < N < M, such as 2:4 (N zeros in every M), got '{pattern}'")
    return NofM(int(match[1]), int(match[2]))


def mask_rule(pattern: str, sparsity: float, scope: str, inclusive: bool = False) -> MaskRule:
    """The rule for these options; ``scope`` is ``row`` or ``layer`` (one matrix). A pattern overrides the rest."""
    if pattern:
        return parse_pattern(pattern)
    return PerRow(sparsity) if scope == "row" else PerMatrix(sparsity, inclusive)


def kth_smallest(flat: Tensor, k: int) -> float:
    """The value at 0-based position ``k`` of the sorted vector; quick-select, no sort."""
    if flat.is_cuda:
        return float(flat.kthvalue(k + 1).values)
    return float(np.partition(flat.numpy(), k)[k])


def _lowest(scores_RC: Tensor, count: int) -> Tensor:
    """True for the ``count`` lowest entries of every row; among equals the first ones."""
    if count == 0:
        return torch.zeros_like(scores_RC, dtype=torch.bool)
    if scores_RC.shape[1] <= 16:
        return _lowest_of_few(scores_RC, count)
    threshold = _row_threshold(scores_RC, count)
    lowest = scores_RC <= threshold
    # at least `count` in every row, and more where there are ties
    if int(lowest.count_nonzero()) > count * len(lowest):
        tied = (lowest.count_nonzero(dim=1) > count).nonzero().flatten()
        below, equal = scores_RC[tied] < threshold[tied], scores_RC[tied] == threshold[tied]
        wanted = count - below.sum(dim=1, keepdim=True)
        lowest[tied] = below | (equal & (equal.cumsum(dim=1) <= wanted))
    return lowest


def _row_threshold(scores_RC: Tensor, count: int) -> Tensor:
    if scores_RC.is_cuda:
        return scores_RC.kthvalue(count, dim=1, keepdim=True).values
    return torch.from_numpy(np.partition(scores_RC.numpy(), count - 1, axis=1)[:, count - 1 : count].copy())


def _lowest_of_few(scores_RC: Tensor, count: int) -> Tensor:
    # ranks by pairwise comparison: for the short runs of N:M this beats sorting by an order of magnitude
    parts = scores_RC.T.contiguous()
    lowest = torch.empty(parts.shape, dtype=torch.bool, device=parts.device)
    for i in range(len(parts)):
        rank = (parts[:i] <= parts[i]).sum(dim=0) + (parts[i + 1 :] < parts[i]).sum(dim=0)
        lowest[i] = rank < count
    return lowest.T


def lowest_of_all(parts: Callable[[], Iterable[Tensor]], count: int) -> Iterator[Tensor]:
    """For every part (float32 scores of any shape): True for those among the ``count`` lowest entries of all parts.

    Exact, ties included (the first ones leave), though only one part is in memory at a time: ``parts`` is called
    three times, and the threshold is found by counting its upper and then its lower 16 bits.
    """
    high = sum((_histogram(_ordered(part) >> 16) for part in parts()), np.zeros(1 << 16, dtype=np.int64))
    before = np.cumsum(high)
    top = int(np.searchsorted(before, count)) if count else 0
    rest = count - (int(before[top - 1]) if top else 0)
    low = np.zeros(1 << 16, dtype=np.int64)
    for part in parts():
        key = _ordered(part)
        low += _histogram(key[key >> 16 == top] & 0xFFFF)
    below = np.cumsum(low)
    bottom = int(np.searchsorted(below, rest)) if count else 0
    threshold, ties = (top << 16) + bottom, rest - (int(below[bottom - 1]) if bottom else 0)
    for part in parts():
        key = _ordered(part)
        equal = key == threshold
        # of those at the threshold, as many leave as are still wanted
        leave = (key < threshold) | (equal & (np.cumsum(equal) <= ties))
        ties -= min(ties, int(np.count_nonzero(equal)))
        yield torch.from_numpy(leave).reshape(part.shape)


def _ordered(scores: Tensor) -> np.ndarray:
    """Integers [entries] that are ordered as the float32 scores are."""
    # adding 0.0 makes -0.0 the same as 0.0
    bits = (scores.detach().float().cpu().contiguous().reshape(-1) + 0.0).numpy().view(np.uint32)
    return np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))


def _histogram(keys: np.ndarray) -> np.ndarray:
    return np.bincount(keys, minlength=1 << 16).astype(np.int64)
