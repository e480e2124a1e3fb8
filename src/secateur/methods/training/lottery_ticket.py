"""Lottery tickets: train, remove the smallest weights, take the others back to where they began, and train again.

    theta_0 ~ D, m = 1
    theta_T <- training of m * theta_0                          all of it, with a new optimizer
    m       <- m without the ceil(p * live) smallest |theta_T|
    theta   <- m * theta_0                                      norms, biases and their statistics too

The fraction (1 - p)^l is left after l levels. A ticket "wins" when it learns at least as well as the dense network in
as many steps. With `one_shot` all masks come from the dense network. `scope=layer` with `output_rate=0.1` and 20 % for
the rest is the paper's LeNet; `conv_rate=0.1` or `0.15` its Conv-2, Conv-4 and Conv-6. With `scope=global` layers of
one rate compete, so that `output_rate=0` leaves the last layer out.

Source: J. Frankle and M. Carbin, "The lottery ticket hypothesis: finding sparse, trainable neural networks", ICLR 2019,
arXiv:1803.03635; official code facebookresearch/open_lth (all weights compete, p = 0.2), and
google-research/lottery-ticket-hypothesis. Differs from it: weights are chosen by index, where its thresholds remove one
more and ties; the share is that of the weights which may leave, where the code counts those of ignored layers as well.
"""

from dataclasses import dataclass
from typing import ClassVar

from secateur.methods import Descriptor, TicketMethod, register


@register("lottery_ticket")
@dataclass(frozen=True, kw_only=True)
class LotteryTicket(TicketMethod):
    """Options of lottery tickets; defaults from open_lth."""

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
