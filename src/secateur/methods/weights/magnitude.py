"""Magnitude: remove the weights that are smallest in absolute value.

    score_ij = |W_ij|

No data. The weights of one matrix compete with each other; other scopes and N:M patterns are options.

Source: Han et al., "Learning both weights and connections", NeurIPS 2015, arXiv:1506.02626; as a language-model
baseline in locuslab/wanda. Differs from that code: exactly floor(entries * sparsity) weights leave; its `<=`
against sorted[floor(entries * sparsity)] removes one more, and all ties (option `inclusive`).
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.allocate import MaskRule, mask_rule
from secateur.errors import OptionError
from secateur.methods import Descriptor, Seen, Target, WeightMethod, option, register


@register("magnitude")
@dataclass(frozen=True, kw_only=True)
class Magnitude(WeightMethod):
    """Options of magnitude pruning."""

    scope: str = option("layer", "who competes: one matrix, one output row, or all", choices=("layer", "row", "global"))
    inclusive: bool = option(False, "the published rule, which also removes the entry at the threshold and all ties")

    descriptor: ClassVar = Descriptor(
        object="weights",
        granularity="element",
        score="magnitude",
        allocation="uniform",
        data="none",
        speedup="memory_only",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.inclusive and (self.pattern or self.scope != "layer"):
            raise OptionError(
                "magnitude: inclusive is a rule for the threshold of a matrix: leave scope and pattern out"
            )

    def score(self, target: Target, seen: Seen) -> Tensor:
        return target.weight.abs()

    def rule(self) -> MaskRule:
        return mask_rule(self.pattern, self.sparsity, self.scope, self.inclusive)
