"""PreCrop: build a narrower network before training, with layers as wide as their densities ask for.

What a network learns that is pruned before training depends on how many weights each layer keeps, not on which. So
layers get densities p_l, and whole channels go until every layer is about as small:

    synexp          max sum_l log p_l  s.t.  sum_l n_l p_l <= B, sum_l f_l p_l <= F, p_l <= 1
                    p_l = min(1, 1/(lambda n_l + mu f_l))      n_l weights, f_l multiply-accumulates of layer l
    synflow         share of the weights that SynFlow keeps in 100 rounds
    snip, grasp     share of the weights with the largest |w dL/dw|, or w (H dL/dw)
    erk, uniform    Erdos-Renyi-Kernel; the same everywhere

    min_r sum_l w_l (log r_a(l) + log r_b(l) - log p_l)^2      layer l lies between the groups a and b
    c_g = round(s r_g C_g), r_g <= 1                           one s for all groups, such that the budget is met

The first c_g channels of every group stay, and layers whose shape has changed are drawn anew. Channels that a residual
connection carries stay unless crop_residual is set. Train the result as you would the dense network; for a trained one
take taylor or spa_l1. For masks the claim needs norms between the layers, or weights scaled by 1/sqrt(p_l), which is
what a new draw does for a narrower layer.

Source: Y. Cai et al., "Structured Pruning is All You Need for Pruning CNNs at Initialization", 2022, arXiv:2203.02549.
There is no official code; the least squares and the multiplier s are ours. ERK: arXiv:1911.11134.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from secateur.allocate import crop_scores, erk, fit_shares, global_masks, of_masks, synexp, uniform
from secateur.allocate.densities import Densities
from secateur.criteria.connections import grasp, snip
from secateur.errors import UnsupportedModelError
from secateur.methods import ChannelMethod, Descriptor, Whole, option, register


@register("precrop")
@dataclass(frozen=True, kw_only=True)
class PreCrop(ChannelMethod):
    """Options of PreCropping."""

    densities: str = option(
        "synexp",
        "where the densities of layers come from",
        choices=("synexp", "synflow", "snip", "grasp", "erk", "uniform"),
    )
    keep_macs: float = option(
        1.0, "fraction of the MACs that stays at most, to one channel, beside the budget", gt=0, le=1
    )
    crop_residual: bool = option(False, "whether channels of residual connections may leave too")
    fit: str = option("layers", "what counts the same in the least squares", choices=("layers", "weights"))
    init: str = option(
        "fresh",
        "start of layers whose shape changes: a new draw, or the first channels at its scale",
        choices=("fresh", "first"),
    )
    rounds: int = option(100, "rounds of SynFlow", unit="rounds", ge=1)
    scope: str = option("global", "one multiplier for the widths of all groups", choices=("global",))
    normalizer: str = option("none", "what the scores of a group are divided by", choices=("none",))

    only_modules: ClassVar = "it draws the layers of the narrower network anew, and ONNX has no layers"
    descriptor: ClassVar = Descriptor(
        object="channels",
        granularity="structured_group",
        when="before_training",
        score="density",
        allocation="global",
        recovery="fresh_weights",
        data="none",
        speedup="real",
    )

    cap: ClassVar[float | None] = 1.0
    """Largest density of a layer, None for none."""

    def widest(self) -> float:
        """Largest width of a group, as a multiple of its channels."""
        return 1.0

    def needed(self) -> tuple[str, ...]:
        return {"snip": ("gradient",), "grasp": ("curvature",)}.get(self.densities, ())

    def initialisation(self) -> str:
        return self.init

    def budgets(self, sparsity: float) -> Mapping[str, float]:
        limits = {self.budget: sparsity}
        if self.keep_macs < 1:
            limits["macs"] = max(1 - self.keep_macs, limits.get("macs", 0.0))
        return limits

    def layer_densities(self, whole: Whole) -> Densities:
        return DENSITIES[self.densities](self, whole)

    def scores(self, whole: Whole) -> Mapping[str, Tensor | None]:
        groups = [g for g in whole.groups if self.crop_residual or g.name not in whole.streams]
        if not groups:
            return _nothing(whole)
        kept = self.layer_densities(whole)
        exponents_LG = np.array([[layer.exponents.get(g.name, 0.0) for g in groups] for layer in whole.layers])
        weights_L = np.array([layer.weights for layer in whole.layers]) * kept if self.fit == "weights" else None
        shares = fit_shares(exponents_LG, kept, weights_L, self.widest())
        return {
            group.name: crop_scores(int(self.widest() * group.units), share, group.units)
            for group, share in zip(groups, shares, strict=True)
        }


def _nothing(whole: Whole) -> dict[str, Tensor | None]:
    if whole.groups:
        raise UnsupportedModelError(
            f"all channels of {whole.anatomy.model_type} lie on residual connections, such as {whole.groups[0].name}:"
            " set crop_residual to let them leave"
        )
    return {}


def _synexp(method: PreCrop, whole: Whole) -> Densities:
    weights, macs = [layer.weights for layer in whole.layers], [layer.macs for layer in whole.layers]
    limits = method.budgets(method.sparsity)
    # bytes and channels have no share per layer of their own: what counts is how many weights stay
    of_weights = next((fraction for budget, fraction in limits.items() if budget != "macs"), 0.0)
    return synexp(
        weights,
        macs,
        max_weights=(1 - of_weights) * sum(weights),
        max_macs=(1 - limits.get("macs", 0.0)) * sum(macs),
        cap=method.cap,
    )


def _erk(method: PreCrop, whole: Whole) -> Densities:
    return erk([layer.shape for layer in whole.layers], 1 - method.sparsity)


def _uniform(method: PreCrop, whole: Whole) -> Densities:
    return uniform([layer.shape for layer in whole.layers], 1 - method.sparsity)


def _synflow(method: PreCrop, whole: Whole) -> Densities:
    return of_masks(global_masks(whole.flow, _shapes(whole), 1 - method.sparsity, method.rounds))


def _snip(method: PreCrop, whole: Whole) -> Densities:
    return _one_shot(method, whole, {n: snip(whole.parameters[n], g) for n, g in whole.learned["gradient"].items()})


def _grasp(method: PreCrop, whole: Whole) -> Densities:
    return _one_shot(method, whole, {n: grasp(whole.parameters[n], c) for n, c in whole.learned["curvature"].items()})


def _one_shot(method: PreCrop, whole: Whole, scores: Mapping[str, Tensor]) -> Densities:
    shapes = _shapes(whole)
    # a parameter that isn't trained has no gradient, and its layer no score
    found = {name: scores.get(name, torch.zeros(shape)) for name, shape in shapes.items()}
    return of_masks(global_masks(lambda masks: found, shapes, 1 - method.sparsity))


def _shapes(whole: Whole) -> dict[str, tuple[int, ...]]:
    return {layer.tensor: layer.shape for layer in whole.layers}


DENSITIES: dict[str, Callable[[PreCrop, Whole], Densities]] = {
    "synexp": _synexp,
    "synflow": _synflow,
    "snip": _snip,
    "grasp": _grasp,
    "erk": _erk,
    "uniform": _uniform,
}
