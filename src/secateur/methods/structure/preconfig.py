"""PreConfig: spread parameters and operations over the layers anew before training; layers may also get wider.

The optimisation of PreCrop without its cap, so that the capacity which one layer gives up another one gets:

    max sum_l log p_l   s.t.   sum_l n_l p_l <= B,  sum_l f_l p_l <= F
    p_l = 1 / (lambda n_l + mu f_l)            n_l weights, f_l multiply-accumulates of layer l

    min_r sum_l w_l (log r_a(l) + log r_b(l) - log p_l)^2      layer l lies between the groups a and b
    c_g = round(s r_g C_g), r_g <= max_expansion               one s for all groups, such that both budgets hold

sparsity is what leaves of the parameters, keep_macs what may stay of the operations. All layers whose shape has changed
are drawn anew. Meant for networks that are narrow already. At sparsity 0 nothing is asked for, and nothing changes.

Source: Y. Cai et al., "Structured Pruning is All You Need for Pruning CNNs at Initialization", 2022, arXiv:2203.02549.
There is no official code; the least squares and the multiplier s are ours.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from secateur.methods import option, register
from secateur.methods.structure.precrop import PreCrop


@register("preconfig")
@dataclass(frozen=True, kw_only=True)
class PreConfig(PreCrop):
    """Options of PreConfig."""

    sparsity: float = option(0.2, "fraction of the budget that is removed", ge=0, lt=1)
    budget: str = option("params", "what the sparsity is a fraction of", choices=("params", "bytes"))
    densities: str = option("synexp", "where the densities of layers come from", choices=("synexp",))
    max_expansion: float = option(2.0, "widest that a group may get, as a multiple of its channels", ge=1)
    init: str = option("fresh", "start of layers whose shape changes: a new draw", choices=("fresh",))

    cap: ClassVar = None

    def widest(self) -> float:
        return self.max_expansion

    def budgets(self, sparsity: float) -> Mapping[str, float]:
        return {self.budget: sparsity, "macs": 1 - self.keep_macs}
