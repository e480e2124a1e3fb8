"""What training aims at: the text, or a dense teacher's predictions and hidden states.

    ce      -log p(token | tokens before it), mean over predictions
    kl      t^2 KL(teacher || student) of the predictions at temperature t, mean over positions
    hidden  ||h - h_teacher||^2 / ||h_teacher||^2 behind every block that is left, mean over blocks

Logits are float32 here, whatever the forward computed in. Sources: kl and t^2 G. Hinton et al., arXiv:1503.02531;
relative distances of hidden states as in S. Muralidharan et al., Minitron, arXiv:2407.14679.
B windows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from secateur import pieces
from secateur.healing.recovery.states import FinalStates


def cross_entropy(logits_BTV: Tensor, ids_BT: Tensor) -> Tensor:
    """Mean over predictions in nats; every token but the first of a window is predicted. Differentiable once."""
    return pieces.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten())


def divergence(logits_BTV: Tensor, teacher_BTV: Tensor, temperature: float = 1.0) -> Tensor:
    """t^2 KL(teacher || student) in nats, mean over positions; its gradient reaches the student alone."""
    apart = partial(_apart, temperature)
    return pieces.mean_loss(logits_BTV.flatten(0, 1), apart, teacher_BTV.flatten(0, 1)) * temperature**2


def _apart(temperature: float, logits_NV: Tensor, teacher_NV: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of KL(teacher || student) at a temperature t, and (q - p) / t for predictions q of the student, p of it."""

    def log_predictions(logits: Tensor) -> Tensor:
        # a division by 1, as by default, would be a pass over the logits for nothing
        return (logits.float() if temperature == 1 else logits.float() / temperature).log_softmax(dim=-1)

    mine, theirs = log_predictions(logits_NV), log_predictions(teacher_NV)
    p = theirs.exp()
    value = theirs.sub_(mine).mul_(p).sum()
    slope = mine.exp_().sub_(p)
    return value, slope if temperature == 1 else slope.div_(temperature)


def hidden_distance(mine: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
    """Mean over pairs of hidden states of the squared distance, relative to the teacher's squared length."""
    ratios = [
        (a.float() - b.float()).square().sum() / b.float().square().sum() for a, b in zip(mine, theirs, strict=True)
    ]
    return torch.stack(ratios).mean()


@contextmanager
def given(blocks: Iterable[nn.Module]) -> Iterator[list[Tensor]]:
    """The hidden states behind these blocks, as a forward within this gives them.

    A model that is asked for its hidden states gives those behind its last block as the final norm leaves them.
    """
    found: list[Tensor] = []

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    handles = [block.register_forward_hook(keep) for block in blocks]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Objective:
    """The weighted sum of ``terms``. ``layers`` are the blocks of the teacher that those of the student came from.

    ``blocks`` gives the blocks of a model in their order, for ``hidden``; ``states`` are those that are known of the
    teacher, where more than one student learns from it.
    """

    terms: Mapping[str, float]
    temperature: float = 1.0
    teacher: nn.Module | None = None
    layers: Sequence[int] = ()
    blocks: Callable[[Any], Iterable[nn.Module]] = lambda model: ()
    states: FinalStates | None = None

    def __call__(self, model: nn.Module, ids_BT: Tensor) -> Tensor:
        """The loss of a batch of windows, a scalar."""
        blocks = self.blocks if "hidden" in self.terms else lambda model: ()
        with given(blocks(model)) as states:
            mine = model(input_ids=ids_BT, use_cache=False)
        predicted: Any = None
        if self.teacher is not None and {"kl", "hidden"} & set(self.terms):
            # hidden states of all blocks aren't kept
            known = None if "hidden" in self.terms else self.states
            with torch.no_grad(), given(blocks(self.teacher)) as wanted:
                if known is not None:
                    predicted = known.logits(self.teacher, ids_BT)
                else:
                    predicted = self.teacher(input_ids=ids_BT, use_cache=False).logits
        found = {
            "ce": lambda: cross_entropy(mine.logits, ids_BT),
            "kl": lambda: divergence(mine.logits, predicted, self.temperature),
            "hidden": lambda: hidden_distance(states, [wanted[layer] for layer in self.layers]),
        }
        return torch.stack([weight * found[name]() for name, weight in self.terms.items()]).sum()
