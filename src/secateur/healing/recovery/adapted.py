"""A weight with its adapter, as tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Adapted:
    """A frozen weight with its adapter, before a step of the optimiser: the weight is W + ``scaling`` B A.

    ``weight`` is W, [outputs, inputs]; ``down`` A [rank, inputs] and ``up`` B [outputs, rank], with their gradients;
    ``gradient`` is that of W where it was asked for.
    """

    name: str
    weight: Tensor
    down: Tensor
    up: Tensor
    down_gradient: Tensor
    up_gradient: Tensor
    scaling: float
    gradient: Tensor | None = None


def adapted(name: str, layer: Any) -> Adapted:
    """A layer of peft with its one adapter, as it is in a step."""
    (adapter,) = layer.lora_A.keys()
    down, up, weight = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, layer.get_base_layer().weight
    gradient = weight.grad
    turn = layer.fan_in_fan_out
    return Adapted(
        name,
        weight.detach().T if turn else weight.detach(),
        down.detach(),
        up.detach(),
        down.grad,
        up.grad,
        layer.scaling[adapter],
        gradient.T if turn and gradient is not None else gradient,
    )
