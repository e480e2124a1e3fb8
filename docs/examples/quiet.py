"""Quiet: remove the heads and neurons that put the least energy into the layer that reads them.

    score_u = mean over the columns j of unit u of  E[x_j^2]^(p/2) * ||W_:,j||

With p = 2 this is the energy of an input times the length of the weights that read it.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

import secateur as sc
from secateur.allocate import Allocator, UniformAllocator
from secateur.criteria import column_energy, per_unit
from secateur.methods import Descriptor, Seen, Target, UnitMethod, option
from secateur.observe.statistics import SumSquares


@sc.register("quiet")
@dataclass(frozen=True, kw_only=True)
class Quiet(UnitMethod):
    power: float = option(2.0, "exponent p of the activations", gt=0)

    statistics: ClassVar = {"squares": SumSquares}
    descriptor: ClassVar = Descriptor(
        object="heads_and_neurons", granularity="structured_group", score="activation", allocation="uniform",
        data="unlabelled_calibration", speedup="real",
    )  # fmt: skip

    def score(self, target: Target, seen: Seen) -> Tensor:
        squares = seen["squares"]
        energy_C = (squares.total_C / squares.tokens).pow(self.power / 2)
        return per_unit(energy_C * column_energy(target.weight).sqrt(), target.columns, "mean")

    def allocator(self) -> Allocator:
        return UniformAllocator(self.sparsity)
