"""Taylor: remove the coupled channels whose removal changes the loss least, to first order (Taylor-FO) or to second.

    weights:  I_k = mean over batches of  sum over the entries w of the coupled slices of  (g_w * w)^2
    gates:    I_k = mean over batches of  (sum over the scales and shifts of the norms of channel k of g_w * w)^2
    order 2:  I_k = mean over batches of  sum over the entries w of the coupled slices of  (g_w * w - H_ww * w^2 / 2)^2

g is the gradient of the loss of one batch. A gate z = 1 behind a norm has the derivative gamma * dL/dgamma +
beta * dL/dbeta, so gates need no hooks. H_ww is the diagonal of the Hessian, estimated from random products (see
`obd`). The channels with the smallest I of all groups leave; no scale per group.

Source: P. Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019, arXiv:1906.10771; official
code NVlabs/Taylor_pruning (method 0: weights, method 22: gates after batch norms). Differs from it: no
momentum of 0.9 over pruning iterations, since one call removes everything; coupled channels of a residual stream are
scored by the sum over their layers.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.methods import ChannelMethod, Coupled, Descriptor, Part, option, register


@register("taylor")
@dataclass(frozen=True, kw_only=True)
class Taylor(ChannelMethod):
    """Options of the Taylor expansion."""

    normalizer: str = option("none", "what the scores of a group are divided by", choices=("none", "mean", "max"))
    gates: bool = option(True, "order 1: score gates after norms where a group has norms, weights elsewhere")
    order: int = option(1, "order of the expansion of the loss; the second scores weights", ge=1, le=2)
    probes: int = option(16, "order 2: random products from which the diagonal is estimated, for every batch", ge=1)

    needs: ClassVar = ("gradient",)
    per_batch: ClassVar = True
    descriptor: ClassVar = Descriptor(
        object="channels",
        granularity="structured_group",
        score="gradient",
        allocation="global",
        data="labelled_calibration",
        supervision="labels",
        speedup="real",
    )

    def needed(self) -> tuple[str, ...]:
        return ("gradient", "diagonal") if self.order == 2 else self.needs

    def importance(self, part: Part) -> Tensor:
        change = part.weight * part.gradient
        if self.order == 2:
            change = change - 0.5 * part.diagonal * part.weight.square()
        return change.square()

    def score(self, group: Coupled) -> Tensor | None:
        norms = {p.tensor.rpartition(".")[0] for p in group.parts if p.role == "scale"}
        gates = [p for p in group.parts if p.tensor.rpartition(".")[0] in norms]
        if not self.gates or not gates or self.order == 2:
            return super().score(group)
        rows = [p.per_unit((p.weight * p.gradient).double()).sum(dim=1) for p in gates]
        return torch.stack(rows, dim=1).sum(dim=1).square()
