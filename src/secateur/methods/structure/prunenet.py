"""PruneNet: a policy that has learnt from the weights alone which FFN neurons can leave; no data.

    alpha   = sigmoid( (W P^T + b) v )         W [I, d] is gate_proj (or the first FFN matrix), P, b, v the policy
    keep    = binary concrete sample of alpha
    stay      int((1 - r) I) neurons drawn without replacement with the weights `keep` (`selection=topk`: those of
              largest alpha)
    reward    1 / KS distance of the singular values of W and of the rows that stay, 99999 where that is 0

One policy serves all blocks. It learns in 20 episodes by REINFORCE: - log keep of what stayed, times the reward of the
block, discounted by its number, with AdamW and an optimiser step per block. The policy of the best episode is used.
Attention stays as it is; up_proj and down_proj lose the same neurons.

`policy=FOLDER` keeps the policy, and takes the one that is there, at whatever sparsity and for whatever model whose
blocks have as many neurons and inputs. `budget=neurons` makes the sparsity a fraction of the neurons, as the published
ratio is.

Source: "You Only Prune Once: Designing Calibration-Free Model Compression With Policy Learning", ICLR 2025,
arXiv:2501.15296; official code LCS2-IIITD/PruneNet, and the package efficient-pruners (`update=per_episode`). Differs
from the official code: the best policy is the one that earned the reward (theirs: after the updates of that episode);
float32 throughout; eps and alpha stay 1e-6 away from 0 and 1; rows are drawn by an exponential race, the same
distribution. By default the sparsity is a fraction of the parameters.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.allocate import Allocator, UniformAllocator
from secateur.criteria import random_scores
from secateur.methods import Descriptor, PolicyMethod, Seen, Target, option, register
from secateur.search import Episodes, draw_order


@register("prunenet")
@dataclass(frozen=True, kw_only=True)
class PruneNet(PolicyMethod):
    """Options of PruneNet; defaults from the official code."""

    episodes: int = option(20, "episodes in which the policy learns", ge=1)
    rate: float = option(1e-3, "learning rate of AdamW", gt=0)
    discount: float = option(0.99, "of the reward from block to block", gt=0, le=1)
    update: str = option(
        "per_layer",
        "an optimiser step after every block, or (per_episode) one with clipped gradients after all",
        choices=("per_layer", "per_episode"),
    )
    divergence: str = option(
        "off",
        "add the KL divergence of alpha from 1/2 to the loss, or what the official code has for it",
        choices=("off", "official", "exact"),
    )
    selection: str = option(
        "sample", "draw the neurons that stay, or take those of largest alpha", choices=("sample", "topk")
    )

    costly: ClassVar[bool] = True
    descriptor: ClassVar = Descriptor(
        object="heads_and_neurons",
        granularity="structured_group",
        score="policy",
        allocation="uniform",
        data="none",
        speedup="real",
    )

    def episodes_of(self) -> Episodes:
        return Episodes(self.episodes, self.rate, self.discount, self.update, self.divergence, self.seed)

    def score(self, target: Target, seen: Seen) -> Tensor:
        if self.selection == "topk":
            return seen["policy"].logits(seen["writer"])
        keep_U = seen["policy"].keep(seen["writer"], random_scores(target.name, self.seed, (target.units,)))
        # read as a logarithm, which spreads what float32 holds
        return draw_order(keep_U, random_scores(f"{target.name}/order", self.seed, (target.units,))).log()

    def allocator(self) -> Allocator:
        return UniformAllocator(self.sparsity, at_least=True)

    def solve_flops(self, outputs: int, inputs: int) -> int:
        # singular values, of every block once and in every episode, take 4 I d^2 operations, and 2.5 times as long as
        # so many of products
        return (self.episodes + 1) * 10 * inputs * outputs * min(inputs, outputs)
