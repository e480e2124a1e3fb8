"""What sparse weights save in operations, in inference and in training, if a machine can make use of zeros.

    forward                  sum over layers of density_l * f_l, and everything else as it is
    backward to the inputs   the same
    backward to the weights  the same, or the dense sum at steps that need the gradients of dead weights

Source: U. Evci et al., arXiv:1911.11134, appendix H.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from secateur.structure.exporting import evaluation_mode
from secateur.train.weights import Layer, multiplies


@dataclass(frozen=True)
class Flops:
    """Floating-point operations on the example inputs, two for a multiply-accumulate.

    ``inference`` is one forward as the masks are now, ``training`` the mean of a training step so far, forward and
    backward; ``dense`` and ``dense_training`` are the same without masks.
    """

    dense: float
    inference: float
    dense_training: float
    training: float


def count(
    model: nn.Module, layers: Mapping[str, Layer], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[int, dict[str, int]]:
    """(operations of a forward, those of each layer by the name of its weight).

    A layer is what linear and convolutional modules do with its weight; recurrent and attention modules do other things
    as well, and all of theirs count as dense.
    """
    own = [(name, module) for name, layer in layers.items() for module in _appliers(model, layer)]
    found = dict.fromkeys((name for name, _ in own), 0)
    with evaluation_mode(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
        before: list[int] = []
        hooks = []
        for name, module in own:

            def add(*_: Any, name: str = name) -> None:
                found[name] += counter.get_total_flops() - before.pop()

            hooks.append(module.register_forward_pre_hook(lambda *_: before.append(counter.get_total_flops())))
            hooks.append(module.register_forward_hook(add))
        try:
            model(*args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()
    return counter.get_total_flops(), found


def _appliers(model: nn.Module, layer: Layer) -> list[nn.Module]:
    """The modules that do nothing but multiply by a layer's weight: several where it is tied."""
    holding = [m for m in model.modules() if multiplies(m) and m._parameters.get("weight") is layer.weight]
    return [m for m in dict.fromkeys((layer.module, *holding)) if _only_multiplies(m)]


def _only_multiplies(module: nn.Module) -> bool:
    return not isinstance(module, nn.RNNBase | nn.RNNCellBase | nn.MultiheadAttention)


def effective(
    total: int,
    per_layer: Mapping[str, int],
    now: Mapping[str, float],
    mean: Mapping[str, float],
    dense_gradients: float,
) -> Flops:
    """``now`` and ``mean`` are densities; ``dense_gradients`` the share of steps with gradients of dead weights."""

    def sparse(densities: Mapping[str, float]) -> float:
        return total - sum(flops * (1.0 - densities[name]) for name, flops in per_layer.items())

    step = sparse(mean)
    weights = (1.0 - dense_gradients) * step + dense_gradients * total
    return Flops(float(total), sparse(now), 3.0 * total, 2.0 * step + weights)
