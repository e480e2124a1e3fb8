"""GraSP: before training, keep the weights without which the gradient would flow worse.

    S = -theta * (H g)            g = dL/dtheta, H its derivative; the highest leave            (eq. 8)

The logits of the classifier are divided by a temperature, which makes its predictions even. All weights compete; one
batch of ten examples per class decides. Double backward: it takes about twice the memory of a training step.

Source: C. Wang et al., "Picking winning tickets before training by preserving gradient flow", ICLR 2020,
arXiv:2002.07376; official code alecwangcq/GraSP. Differs from it: linear layers aren't drawn anew for the score; with
several batches H g is the mean of theirs. A loss of your own is taken as it is, without the temperature.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from secateur.criteria.connections import grasp
from secateur.methods import Descriptor, StartingMethod, Trained, option, register
from secateur.observe.gradients import cross_entropy


@register("grasp")
@dataclass(frozen=True, kw_only=True)
class GraSP(StartingMethod):
    """Options of GraSP; defaults from the official code."""

    temperature: float = option(200.0, "what logits are divided by", gt=0)

    needs: ClassVar = ("curvature",)
    descriptor: ClassVar = Descriptor(
        object="weights",
        granularity="element",
        when="before_training",
        score="second_order",
        allocation="global",
        data="labelled_calibration",
        supervision="labels",
        speedup="memory_only",
    )

    def loss(self) -> Callable[[nn.Module, Any], Tensor]:
        return lambda module, batch: cross_entropy(module, batch, self.temperature)

    def score(self, part: Trained) -> Tensor:
        return grasp(part.weight, part.curvature)
