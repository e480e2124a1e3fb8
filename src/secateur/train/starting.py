"""Pruning before training: masks from the loss of some batches, or from synaptic flow, in one or more rounds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from secateur.allocate import keep_highest
from secateur.errors import DataError
from secateur.methods import StartingMethod, Trained
from secateur.observe.flow import synaptic_flow
from secateur.observe.gradients import Loss, batches, cross_entropy, learned
from secateur.structure.exporting import evaluation_mode
from secateur.train.parts import clear_dead
from secateur.train.updating import Masks, Reduce, scored
from secateur.train.weights import Layer


@dataclass(frozen=True)
class Given:
    """What masks before training are found from: batches with the loss of one, or what the network is called with."""

    data: Any = None
    loss: Loss | None = None
    example_inputs: Sequence[Any] | None = None
    example_kwargs: Mapping[str, Any] | None = None

    def check(self, method: StartingMethod) -> None:
        """Raises DataError when the method looks at something else."""
        if method.needs == ("flow",):
            if self.example_inputs is None and self.example_kwargs is None:
                raise DataError(
                    f"{method.name} runs the network on ones: give example_inputs=(x,), what it is called with"
                )
        elif self.data is None:
            raise DataError(
                f"{method.name} scores weights by a loss on labelled data: give data= (batches of inputs and labels)"
                " and, for anything but a classifier, loss="
            )


def starting_masks(
    method: StartingMethod, model: nn.Module, layers: Mapping[str, Layer], given: Given, reduce: Reduce
) -> Masks:
    """The masks of the last round. The model is left as it is. Raises DataError or NonFiniteError."""
    given.check(method)
    masks: Masks = {name: torch.ones_like(layer.weight, dtype=torch.bool) for name, layer in layers.items()}
    # batches are read once, so that every round sees the same ones
    given = replace(given, data=list(batches(given.data)) if given.data is not None else None)
    for sparsity in method.sparsities() if method.sparsity else ():
        parts = dict(_parts(method, model, layers, masks, given))
        scores = scored(parts, method.score, reduce, "scores")
        live = {name: score.masked_fill(~masks[name], -torch.inf) for name, score in scores.items()}
        masks = keep_highest(live, sparsity, scope=method.competition(), floor=method.floor)
    return masks


def _parts(
    method: StartingMethod, model: nn.Module, layers: Mapping[str, Layer], masks: Masks, given: Given
) -> Iterator[tuple[str, Trained]]:
    if method.needs == ("flow",):
        replaced = {name: layer.weight.detach() * masks[name] for name, layer in layers.items()}
        flow = synaptic_flow(model, given.example_inputs or (), given.example_kwargs or {}, replaced)
        for name, layer in layers.items():
            yield name, Trained(name, layer.weight.detach(), masks[name], seed=method.seed, flow=flow[name])
        return
    loss = given.loss or method.loss() or cross_entropy
    with masked(layers, masks), evaluation_mode(model):
        [found] = learned(model, given.data, loss, method.needs, per_batch=False)
        for name, layer in layers.items():
            part = Trained(name, layer.weight.detach().clone(), masks[name], seed=method.seed)
            yield name, replace(part, **{kind: tensors[name] for kind, tensors in found.items()})


@contextmanager
def masked(layers: Mapping[str, Layer], masks: Mapping[str, Tensor]) -> Iterator[None]:
    """Dead weights are zero within the block, and what they were behind it."""
    before = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            clear_dead(layer.weight.data, masks[name])
        yield
    finally:
        for name, layer in layers.items():
            layer.weight.data.copy_(before[name])
