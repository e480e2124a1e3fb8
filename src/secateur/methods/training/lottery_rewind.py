"""Lottery tickets with rewinding: weights go back to an early step of the training, and not to its beginning.

    theta_k <- training of theta_0 until step k                 once
    theta_T <- training of m * theta_k from step k to its end   with a new optimizer; the schedule goes on at k
    m       <- m without the ceil(p * live) smallest |theta_T|
    theta   <- m * theta_k                                      norms, biases and their statistics too

Deep networks have tickets from such a step on (0.1 % to 7 % of the training), at which training has become stable:
`secateur stability` measures that. With `start=0` this is `lottery_ticket`. `rewind=rate` takes back the learning rate
alone: weights that stay keep what they have become, and are trained again from step k.

Source: J. Frankle et al., "Stabilizing the lottery ticket hypothesis", 2019, arXiv:1903.01611; official code
facebookresearch/open_lth. A. Renda et al., "Comparing rewinding and fine-tuning in neural network pruning", ICLR 2020,
arXiv:2003.02389, for `rewind=rate`. As in the code, level 0 is the dense network from step k on, and what an optimizer
remembers at step k isn't kept. Differs from it in what `lottery_ticket` differs in.
"""

from dataclasses import dataclass
from typing import ClassVar

from secateur.methods import Descriptor, TicketMethod, option, register
from secateur.methods.rounds import checked_step


@register("lottery_rewind")
@dataclass(frozen=True, kw_only=True)
class LotteryRewind(TicketMethod):
    """Options of lottery tickets with rewinding; defaults from the papers."""

    start_at: str = option("500", "step k that is gone back to, or its part of the training (3%)")
    rewind: str = option("weights", "what goes back: weights, or the learning rate alone", choices=("weights", "rate"))
    steps: int = option(0, "length of the training, where the step is a part of it", unit="steps", ge=0)

    descriptor: ClassVar = Descriptor(
        object="weights",
        granularity="element",
        when="during_training",
        score="magnitude",
        allocation="global",
        recovery="training",
        data="none",
        speedup="memory_only",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.start()

    def start(self) -> int:
        return checked_step(f"{self.name}: start_at", self.start_at, self.steps)

    def length(self) -> int:
        return self.steps

    def rewinds(self) -> bool:
        return self.rewind == "weights"
