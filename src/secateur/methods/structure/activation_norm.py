"""Activation norm: remove the coupled channels that are small on data.

    I_k = mean over the weights that read channel k of  sqrt(mean of x_k^2 over inputs and positions)
    I_k <- I_k / mean over the channels of the group        groups compete on one scale

x_k is the channel as a weight reads it, behind norms and activation functions; in a convolution every position of the
kernel counts, with the zeros of the padding. Groups that nothing reads as a product of matrices stay. Labels aren't
looked at, and nothing is fitted afterwards.

Source: the activation criterion of P. Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient
Inference", ICLR 2017, arXiv:1611.06440, section 2.2 (mean or standard deviation there), with the l2 norm of S.
Muralidharan et al., "Compact Language Models via Pruning and Knowledge Distillation", 2024, arXiv:2407.14679, section
2.2. Lifting it to coupled groups is ours.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.criteria.groups import mean_of_places
from secateur.methods import ChannelMethod, Consumer, Coupled, Descriptor, register


@register("activation_norm")
@dataclass(frozen=True, kw_only=True)
class ActivationNorm(ChannelMethod):
    """Options of the activation norm."""

    needs: ClassVar = ("inputs",)
    descriptor: ClassVar = Descriptor(
        object="channels",
        granularity="structured_group",
        score="activation",
        allocation="global",
        data="unlabelled_calibration",
        speedup="real",
    )

    def score(self, group: Coupled) -> Tensor | None:
        if not group.consumers:
            return None
        squares = [(_mean_squares(consumer), consumer.columns) for consumer in group.consumers]
        return mean_of_places(squares, lambda mine: mine.mean().sqrt())


def _mean_squares(consumer: Consumer) -> Tensor:
    """Mean square of every column that a weight reads, [columns] float64."""
    return consumer.gram.total_CC.diagonal().double() / max(consumer.gram.tokens, 1)
