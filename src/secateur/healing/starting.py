"""How the layers of a narrower network start that is trained from the beginning.

    fresh   drawn by the layer's own ``reset_parameters``, which knows the new number of inputs
    first   the weights of the channels that stay, times sqrt(dense inputs / inputs), the scale of a new draw

Only layers whose shape has changed are touched: the others hold a draw of the right size already. Norms and
embeddings, whose start doesn't depend on widths, keep the entries of what stays, and so do parameters that lie outside
of any layer with a ``reset_parameters``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from secateur.drawing import seeded
from secateur.structure.modulecut import shell, state_sizes
from secateur.structure.trace import attribute

NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_WIDTHLESS = (*NORMS, nn.Embedding, nn.EmbeddingBag)


def start_anew(made: nn.Module, dense: nn.Module, changed: Collection[str], how: str, seed: int) -> None:
    """Give the layers of ``made`` that hold one of the ``changed`` parameters their first weights, in place.

    ``how`` is ``fresh`` or ``first``. ``made`` has the parameters of ``dense`` by name, cut; it may be a
    ``GraphModule``, since the layers that draw are those of ``dense``. The same seed gives the same weights, and the
    global random state stays.
    """
    with seeded(seed), torch.no_grad():
        for path, layer in dense.named_modules():
            own = [name for name, _ in layer.named_parameters(prefix=path, recurse=False) if name in changed]
            if own and not isinstance(layer, _WIDTHLESS) and _reset(layer) is not None:
                START[how](made, path, layer)


def _reset(layer: nn.Module) -> Callable[[], Any] | None:
    # torch's attention has it under a private name
    return getattr(layer, "reset_parameters", None) or getattr(layer, "_reset_parameters", None)


def _fresh(made: nn.Module, path: str, layer: nn.Module) -> None:
    copied = shell(layer)
    for name, _ in layer.named_parameters():
        owner, _, leaf = name.rpartition(".")
        setattr(copied.get_submodule(owner), leaf, attribute(made, f"{path}.{name}" if path else name))
    state_sizes(copied)
    reset = _reset(copied)
    assert reset is not None
    reset()


def _first(made: nn.Module, path: str, layer: nn.Module) -> None:
    for name, parameter in layer.named_parameters(prefix=path, recurse=False):
        kept = attribute(made, name)
        if kept.dim() > 1 and kept.shape != parameter.shape:
            kept *= math.sqrt(_fan_in(parameter) / _fan_in(kept))


def _fan_in(weight: Tensor) -> int:
    """As torch counts it, from the second dimension on."""
    return math.prod(weight.shape[1:])


START: dict[str, Callable[[nn.Module, str, nn.Module], None]] = {"fresh": _fresh, "first": _first}
