"""SAP: lottery tickets whose rate follows from how sparse the trained weights are, by their PQ index.

    I   = 1 - d^(1/q - 1/p) * ||w||_p / ||w||_q                 of the d live weights of a scope, trained
    r   = ceil(d * (1 + eta)^(-q / (q - p)) * (1 - I)^(pq / (q - p)))
    c   = floor(d * min(gamma * (1 - r / d), beta))             smallest |w| of the scope leave

Weights that stay go back to where they began. A scope is a neuron (an output of a layer), a layer, or everything. The
index falls from level to level while a network is regularised, and with it the rate. (p, q) = (1, 2) or a larger gamma
remove more.

Source: E. Diao et al., "Pruning deep neural networks from a sparsity perspective", ICLR 2023, arXiv:2302.05601
(`scope=neuron` and `layer` do best); official code
dem123456789/Pruning-Deep-Neural-Networks-from-a-Sparsity-Perspective (30 rounds). Differs from it: weights are chosen
by index, where its threshold keeps ties; c is the whole number that the formula says, where rounding in float32 makes
it one less in many rows, and a short row then stays as it is (docs/results/lottery.md); statistics of batch norms go
back too. A training takes its best epoch there: here it is the training function's to say.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.criteria.sparsity import check_orders, pq_index, retained
from secateur.errors import OptionError, UsageError
from secateur.methods import Contest, Descriptor, RoundsMethod, option, register
from secateur.methods.rounds import CONTESTS


@register("sap")
@dataclass(frozen=True, kw_only=True)
class SAP(RoundsMethod):
    """Options of SAP; defaults from the official code."""

    levels: int = option(30, "removals, each after a training", unit="levels", ge=1)
    scope: str = option("neuron", "weights that are measured together, and compete", choices=CONTESTS)
    p: float = option(0.5, "order of the smaller norm", gt=0)
    q: float = option(1.0, "order of the larger norm", gt=0)
    eta: float = option(0.0, "what may leave of the sum of |w|^p, against what stays", ge=0)
    gamma: float = option(1.0, "how much of what the bound allows leaves", ge=0)
    beta: float = option(0.9, "the largest share that leaves at a level", ge=0, le=1)

    descriptor: ClassVar = Descriptor(
        object="weights",
        granularity="element",
        when="during_training",
        score="magnitude",
        allocation="by_layer",
        recovery="training",
        data="none",
        speedup="memory_only",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            check_orders(self.p, self.q)
        except UsageError as error:
            raise OptionError(f"{self.name}: {error}") from None

    def leaving(self, contest: Contest) -> Tensor:
        d_U = contest.live_U
        index_U = pq_index(contest.weight_UW, self.p, self.q, dim=1, mask=contest.mask_UW)
        r_U = _ceil(retained(index_U, d_U, self.p, self.q, self.eta))
        share_U = (self.gamma * (1.0 - r_U / d_U.clamp_min(1))).clamp(0.0, self.beta)
        return (d_U * share_U + 1e-9).floor().to(torch.int64)


def _ceil(x: Tensor) -> Tensor:
    # what is an integer but for rounding is that integer
    return (x - 1e-9 * x.clamp_min(1)).ceil()
