"""Learning rates: functions of the number of the step, counted from 0.

cosine     above 0 from the first step on, up linearly to the peak, then half a cosine towards 0
linear     the same, then a straight line towards 0
constant   the same, then the peak
steps      the same, then the peak times ``gamma`` for every milestone that is passed
wsd        warm-up, stable, decay (Adapt-Pruner, arXiv:2502.03460): begins at 0, and falls linearly in the end
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Rate:
    """Step → learning rate, of a training of ``steps``.

    ``warmup`` and ``cooldown`` are fractions of the steps, ``milestones`` too; ``floor`` is a fraction of the ``peak``.
    """

    peak: float
    steps: int
    shape: str = "cosine"
    warmup: float = 0.0
    cooldown: float = 0.1
    floor: float = 0.0
    milestones: tuple[float, ...] = ()
    gamma: float = 0.1

    def __call__(self, step: int) -> float:
        return self.peak * SHAPES[self.shape](self, step)


def _warmed(rate: Rate, step: int, behind: Callable[[float], float]) -> float:
    """The factor of the peak; ``behind`` gives it by the part of the steps behind the warm-up that is gone."""
    warm = round(rate.warmup * rate.steps)
    return (step + 1) / warm if step < warm else behind((step - warm) / max(1, rate.steps - warm))


def _cosine(rate: Rate, step: int) -> float:
    return _warmed(rate, step, lambda gone: _falling(rate, 0.5 * (1 + math.cos(math.pi * gone))))


def _linear(rate: Rate, step: int) -> float:
    return _warmed(rate, step, lambda gone: _falling(rate, 1 - gone))


def _falling(rate: Rate, part: float) -> float:
    return rate.floor + (1 - rate.floor) * part


def _steps(rate: Rate, step: int) -> float:
    passed = sum(step >= round(milestone * rate.steps) for milestone in rate.milestones)
    return _warmed(rate, step, lambda gone: rate.gamma**passed)


def _wsd(rate: Rate, step: int) -> float:
    warm, cool = round(rate.warmup * rate.steps), round(rate.cooldown * rate.steps)
    rising = step / warm if warm else 1.0
    falling = _falling(rate, (rate.steps - step) / cool) if cool else 1.0
    return min(1.0, rising, falling)


SHAPES: dict[str, Callable[[Rate, int], float]] = {
    "cosine": _cosine,
    "linear": _linear,
    "constant": lambda rate, step: _warmed(rate, step, lambda gone: 1.0),
    "steps": _steps,
    "wsd": _wsd,
}
"""The factor of the peak at a step."""
