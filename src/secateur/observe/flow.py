"""Synaptic flow: what each weight passes on of a signal of ones, when every weight is taken by its magnitude.

    R    = sum of the outputs of the network with |theta| for theta, on inputs of ones
    s(w) = |w * dR/dw|

No data and no loss. Source: H. Tanaka et al., "Pruning neural networks without any data by iteratively conserving
synaptic flow", NeurIPS 2020, arXiv:2006.05467, eq. 2 and algorithm 1; official code ganguli-lab/Synaptic-Flow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map_only

from secateur.errors import NonFiniteError, UnsupportedModelError
from secateur.finite import all_finite
from secateur.structure.exporting import evaluation_mode


def synaptic_flow(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], replaced: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """|w * dR/dw| of every parameter, by name, float64 and shaped like it; the module is left as it is.

    ``args`` and ``kwargs`` are example inputs: those of floating point are taken as ones. ``replaced`` stand in for
    parameters of the same name, such as masked ones. Parameters and buffers of floating point are taken by magnitude,
    statistics of norms too, in evaluation mode and float64, as products over many layers leave the range of float32.
    Raises UnsupportedModelError for a module that doesn't compute in float64, NonFiniteError.
    """
    named = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    # one tensor for all names of a tied one, or its gradient would be in parts
    instead = {id(named[name]): tensor for name, tensor in (replaced or {}).items()}
    by_id = {id(t): _magnitude(instead.get(id(t), t)) for t in named.values()}
    magnitudes = {name: by_id[id(t)] for name, t in named.items()}
    weights = {
        name: magnitudes[name].requires_grad_()
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if parameter.is_floating_point()
    }
    ones = tree_map_only(Tensor, _ones, (args, kwargs))
    with evaluation_mode(module):
        try:
            outputs = functional_call(module, magnitudes, tuple(ones[0]), dict(ones[1]))
        except RuntimeError as error:
            first = str(error).splitlines()[0]
            raise UnsupportedModelError(
                f"{type(module).__name__} can't be run in float64, which synaptic flow needs: {first}"
            ) from None
        floating = [t for t in tree_leaves(outputs) if isinstance(t, Tensor) and t.is_floating_point()]
        total = sum((t.sum() for t in floating), torch.zeros((), dtype=torch.float64))
        gradients = torch.autograd.grad(total, list(weights.values()), allow_unused=True)
    found = {
        name: torch.zeros_like(weight) if g is None else (weight.detach() * g).abs()
        for (name, weight), g in zip(weights.items(), gradients, strict=True)
    }
    for name, scores in found.items():
        if not all_finite(scores):
            raise NonFiniteError(f"the synaptic flow through {name} holds NaN or inf: look at its weights")
    return found


def _magnitude(tensor: Tensor) -> Tensor:
    return tensor.detach().double().abs() if tensor.is_floating_point() else tensor


def _ones(given: Tensor) -> Tensor:
    # indices stay what they are, copied, since networks write into what they are given
    return torch.ones_like(given, dtype=torch.float64) if given.is_floating_point() else given.clone()
