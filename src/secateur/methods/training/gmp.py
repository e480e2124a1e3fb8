"""GMP: gradual magnitude pruning, masks that grow by a cubic ramp while the network is trained.

    s_t = s_f + (s_i - s_f) * (1 - (t - t_0) / (n * dt))^3          (eq. 1)

Every `every` steps the smallest weights of each layer are set to zero until the fraction s_t of them is; they stay
zero, and the others go on. At the same number of weights a large sparse network beats a small dense
one. By default `end` is two thirds of `steps`.

Source: M. Zhu and S. Gupta, "To prune, or not to prune", 2017, arXiv:1710.01878; maintained code
tensorflow/model-optimization, which `block` (blocks of a matrix leave together) and `pattern` are from. Differs from
it: weights are chosen by index, so that ties don't stay beyond what is asked for; the ramp ends with an update at `end`
whether or not `every` meets it; an N:M pattern grows with the ramp, from 0:M to N:M.
"""

from dataclasses import dataclass
from typing import ClassVar

from secateur.allocate import RAMPS, Schedule
from secateur.errors import OptionError
from secateur.methods import Blocks, Descriptor, GradualMethod, option, register
from secateur.methods.during import parse_blocks, parse_zeros


@register("gmp")
@dataclass(frozen=True, kw_only=True)
class GMP(GradualMethod):
    """Options of GMP; defaults from the maintained code, where the paper varies them."""

    pattern: str = option("", "N:M pattern, N zeros in every M consecutive inputs (2:4); overrides sparsity")
    block: str = option("", "rows and columns of a matrix that leave together, such as 1x4")
    pooling: str = option("avg", "score of a block, of the magnitudes in it", choices=("avg", "max"))

    ends: ClassVar = 2 / 3
    descriptor: ClassVar = Descriptor(
        object="weights",
        granularity="element",
        when="during_training",
        score="magnitude",
        allocation="uniform",
        recovery="training",
        data="none",
        speedup="memory_only",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.blocks()
        if self.pattern and (self.block or self.scope != "uniform"):
            raise OptionError("gmp: a pattern says what competes, so it goes neither with block nor with another scope")
        if self.pattern and self.initial > parse_zeros(self.pattern)[0]:
            raise OptionError(
                f"gmp: the sparsity can't go down, from initial {self.initial:g} to pattern {self.pattern}"
            )

    def schedule(self) -> Schedule:
        final = parse_zeros(self.pattern)[0] if self.pattern else self.sparsity
        return RAMPS[self.ramp](self.initial, final, self.begin, self.last, self.power)

    def blocks(self) -> Blocks | None:
        return parse_blocks(self.block, self.pooling)

    def run_length(self) -> int:
        return parse_zeros(self.pattern)[1] if self.pattern else 0
