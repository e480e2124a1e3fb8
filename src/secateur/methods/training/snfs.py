"""SNFS: sparse momentum, weights move to where the mean gradient is large, within layers and between them.

    m <- beta * m + (1 - beta) * dL/dw                                of dead weights too
    p_t = 0.005 + (p_0 - 0.005) / 2 * (1 + cos(pi * t / T))           fraction of a layer that leaves, rounded up
    share_l ~ mean of |m| over the live weights of layer l            of all that leaves

At an update the smallest weights of every layer leave; as many are shared out among the layers, and in each the dead
weights with the largest |m| become live, at zero. A layer less than 20 % sparse whose share is above the mean loses no
larger fraction than its sparsity, so that it doesn't lose what it can't get back. A layer that is full passes the rest
on. The network always has as many weights. By default `end` (T) is the end of the training.

Source: T. Dettmers and L. Zettlemoyer, "Sparse networks from scratch", 2019, arXiv:1907.04840 (p_0 = 0.5, uniform
densities, once per epoch); official code TimDettmers/sparse_learning, for 0.005, 20 % and what is rounded. Differs from
it: the mean of gradients is kept beside the optimizer, whose own momentum is zero where weights are dead; with Adam it
isn't divided by the root of its second moment, and weight decay is no part of it. Random masks and what grows have
exact numbers, where the code corrects the next growth for what the last one missed; a layer may become full, where the
code stops at 99 %.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from secateur.methods import Descriptor, DynamicMethod, Trained, option, register
from secateur.methods.during import GROWTHS

FULL = 0.2
"""Layers below this sparsity are nearly dense."""


@register("snfs")
@dataclass(frozen=True, kw_only=True)
class SNFS(DynamicMethod):
    """Options of SNFS; defaults from the paper."""

    distribution: str = option(
        "uniform", "densities of layers of the random mask at the start", choices=("erk", "uniform")
    )
    fraction: float = option(0.5, "of the live weights that is exchanged at the first update", gt=0, lt=1)
    growth: str = option("momentum", "what grows first among dead weights", choices=tuple(GROWTHS))
    beta: float = option(0.9, "how much of the mean gradient stays at every step", ge=0, lt=1)
    redistribute: bool = option(True, "weights move between layers, by momentum")

    ends: ClassVar = 1.0
    least: ClassVar = 0.005
    descriptor: ClassVar = Descriptor(
        object="weights",
        granularity="element",
        when="during_training",
        score="magnitude",
        allocation="global",
        recovery="training",
        data="training_batches",
        speedup="memory_only",
    )

    def needed(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*super().needed(), *(("momentum",) if self.redistribute else ()))))

    def smoothing(self) -> float:
        return self.beta

    def exchanged(self, live: int, rate: float) -> int:
        return math.ceil(rate * live)

    def exchanged_counts(self, parts: Mapping[str, Trained], rate: float) -> Mapping[str, int]:
        shares = self.shares(parts) or {}
        mean = sum(shares.values()) / len(parts)
        counts = {}
        for name, part in parts.items():
            live, size = int(part.mask.sum()), part.mask.numel()
            sparsity = 1.0 - live / size
            growing = sparsity < FULL and shares.get(name, 0.0) > mean
            counts[name] = self.exchanged(live, min(sparsity, rate) if growing else rate)
        return counts

    def shares(self, parts: Mapping[str, Trained]) -> Mapping[str, float] | None:
        if not self.redistribute:
            return None
        return {name: _mean_momentum(part) for name, part in parts.items()}


def _mean_momentum(part: Trained) -> float:
    return float(part.momentum[part.mask].abs().double().mean()) if bool(part.mask.any()) else 0.0
