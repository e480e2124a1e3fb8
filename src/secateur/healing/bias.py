"""Bias compensation: a removed input channel is replaced by its calibration mean (FLAP, eq. 8)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Healer(Protocol):
    """Makes up for removed units of a group.

    Law: with nothing removed it changes nothing.
    """

    def heal(self, w_OI: Tensor, mean_I: Tensor, gone: Tensor) -> Tensor:
        """What is added to the bias of the module that read the removed input columns ``gone``, [outputs]."""
        ...


@dataclass(frozen=True)
class BiasHealer:
    """Keeps the calibration mean of the module's output exactly as it was."""

    def heal(self, w_OI: Tensor, mean_I: Tensor, gone: Tensor) -> Tensor:
        return mean_bias(w_OI, mean_I, gone)


def mean_bias(w_OI: Tensor, mean_I: Tensor, gone: Tensor) -> Tensor:
    """sum over removed columns j of W_ij * mean_j, [outputs] float64: the best constant stand-in for them."""
    return w_OI[:, gone].double() @ mean_I[gone].double()
