"""What training aims at: the text, or a dense teacher's predictions and hidden states.

    ce      -log p(token | tokens before it), mean over predictions
    kl      t^2 KL(teacher || student) of the predictions at temperature t, mean over positions
    hidden  ||h - h_teacher||^2 / ||h_teacher||^2 behind every block that is left, mean over blocks

Logits are float32 here, whatever the forward computed in. Sources: kl and t^2 G. Hinton et al., arXiv:1503.02531;
relative distances of hidden states as in S. Muralidharan et al., Minitron, arXiv:2407.14679.
B windows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def cross_entropy(logits_BTV: Tensor, ids_BT: Tensor) -> Tensor:
    """Mean over predictions in nats; every token but the first of a window is predicted."""
    return F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1).float(), ids_BT[:, 1:].flatten())


def divergence(logits_BTV: Tensor, teacher_BTV: Tensor, temperature: float = 1.0) -> Tensor:
    """t^2 KL(teacher || student) in nats, mean over positions; its gradient reaches the student alone."""
    mine, theirs = (
        (logits.flatten(0, 1).float() / temperature).log_softmax(dim=-1) for logits in (logits_BTV, teacher_BTV)
    )
    return F.kl_div(mine, theirs, log_target=True, reduction="batchmean") * temperature**2


def hidden_distance(mine: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
    """Mean over pairs of hidden states of the squared distance, relative to the teacher's squared length."""
    ratios = [
        (a.float() - b.float()).square().sum() / b.float().square().sum() for a, b in zip(mine, theirs, strict=True)
    ]
    return torch.stack(ratios).mean()


@dataclass(frozen=True)
class Objective:
    """The weighted sum of ``terms``. ``layers`` are the blocks of the teacher that those of the student came from."""

    terms: Mapping[str, float]
    temperature: float = 1.0
    teacher: nn.Module | None = None
    layers: Sequence[int] = ()

    def __call__(self, model: nn.Module, ids_BT: Tensor) -> Tensor:
        """The loss of a batch of windows, a scalar."""
        wants = {"output_hidden_states": True} if "hidden" in self.terms else {}
        mine = model(input_ids=ids_BT, use_cache=False, **wants)
        theirs: Any = None
        if self.teacher is not None and {"kl", "hidden"} & set(self.terms):
            with torch.no_grad():
                theirs = self.teacher(input_ids=ids_BT, use_cache=False, **wants)
        found = {
            "ce": lambda: cross_entropy(mine.logits, ids_BT),
            "kl": lambda: divergence(mine.logits, theirs.logits, self.temperature),
            # the first state is that of the embedding
            "hidden": lambda: hidden_distance(
                mine.hidden_states[1:], [theirs.hidden_states[layer + 1] for layer in self.layers]
            ),
        }
        return torch.stack([weight * found[name]() for name, weight in self.terms.items()]).sum()
