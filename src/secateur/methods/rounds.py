"""The contract of methods that train, prune and rewind, over and over: lottery tickets and their relatives.

A method says how many weights leave after a training, among which they are chosen, and from where the next training
starts. It never sees a model, an optimizer, a loop or a file: ``secateur.lottery`` owns those.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.errors import OptionError
from secateur.methods.base import Method
from secateur.methods.during import CRITERIA, Trained
from secateur.options import option

CONTESTS = ("global", "layer", "neuron")
"""All weights compete, those of a layer, or those of one output of a layer."""


@dataclass(frozen=True)
class Contest:
    """Weights among which the lowest scores leave, as a matrix: one row for everything, or one per neuron.

    ``kind`` is that of its layers; ``weight_UW`` holds their trained values, ``mask_UW`` which of them are live.
    """

    kind: Hashable
    weight_UW: Tensor
    mask_UW: Tensor

    @property
    def live_U(self) -> Tensor:
        """How many live weights each row has, int64."""
        return self.mask_UW.sum(dim=1)


@dataclass(frozen=True, kw_only=True)
class RoundsMethod(Method):
    """Trains a network, removes weights, takes those that stay back to where they were, and begins anew.

    Level 0 is the dense network; level l the one after l removals.
    """

    levels: int = option(10, "removals, each after a training", unit="levels", ge=1)
    scope: str = option("global", "all weights compete, those of a layer, or of one output", choices=CONTESTS)
    criterion: str = option("magnitude", "score of a weight", choices=("magnitude", "random"))
    one_shot: bool = option(False, "every level is made from the weights of the dense network, trained once")
    order: str = option(
        "fresh", "batches of every level come in their own order, or in the same", choices=("fresh", "same")
    )
    floor: float = option(0.0, "fraction of the weights of every layer that stays whatever the others have", ge=0, lt=1)
    depthwise: bool = option(False, "prune depthwise convolutions too")
    seed: int = option(0, "seed of the first weights, of the order of batches and of controls", ge=0)

    instead: ClassVar[str] = (
        "trains a network many times, and nothing is trained here: give secateur.lottery(network, train,"
        " method='{name}') your training function, or take a method that prunes a trained model ('secateur methods'"
        " shows them all)"
    )

    def start(self) -> int:
        """The step at which every level starts: how far the first weights are trained before."""
        return 0

    def length(self) -> int:
        """Steps of a whole training; 0 where the training function knows it alone."""
        return 0

    def rewinds(self) -> bool:
        """Whether weights that stay go back to what they were; if not, they stay what they have become."""
        return True

    def score(self, part: Trained) -> Tensor:
        """Score of every weight, shaped like it, higher = keep."""
        return CRITERIA[self.criterion](part)

    def kind(self, part: Trained) -> Hashable:
        """Layers of one kind compete with each other where all weights do."""
        return ""

    def leaving(self, contest: Contest) -> Tensor:
        """How many of the live weights of every row leave, [rows] int64."""
        raise NotImplementedError(f"{type(self).__name__} must define leaving()")


@dataclass(frozen=True, kw_only=True)
class TicketMethod(RoundsMethod):
    """The same share of what is left leaves at every level."""

    rate: float = option(0.2, "share of the live weights that leaves at a level", ge=0, lt=1)
    conv_rate: float | None = option(None, "the same of convolutions; none: as the others", ge=0, lt=1)
    output_rate: float | None = option(None, "the same of the last layer; none: as the others", ge=0, lt=1)

    def kind(self, part: Trained) -> float:
        """The share that leaves: layers of one share compete."""
        own = {"output": self.output_rate, "convolution": self.conv_rate}.get(part.kind)
        return self.rate if own is None else own

    def leaving(self, contest: Contest) -> Tensor:
        assert isinstance(contest.kind, float | int)
        # what is an integer but for rounding is that integer
        return torch.tensor([math.ceil(contest.kind * n - 1e-6) for n in contest.live_U.tolist()])


def checked_step(what: str, step: str, steps: int, length: str = "steps") -> int:
    """``500`` or ``3%`` of so many steps, 0 where their number isn't known, as a step.

    ``what`` is its name in errors, and ``length`` that of the option that says how many there are. Raises OptionError.
    """
    text = step.strip()
    try:
        if text.endswith("%"):
            if not steps:
                raise OptionError(f"{what}={step} is a part of the training: give its length with {length}")
            found = round(float(text[:-1]) / 100 * steps)
        else:
            found = int(text)
    except ValueError:
        raise OptionError(f"{what} must be a step (500) or a part of the training (3%), got '{step}'") from None
    if found < 0 or (steps and found > steps):
        raise OptionError(f"{what} is step {found}, but a training has the steps 0 to {steps or '…'}")
    return found
