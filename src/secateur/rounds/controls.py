"""What a ticket is held against: the same number of weights, begun or placed otherwise.

reinit        the mask of the ticket on a new draw of the network
shuffle       the weights of every layer at random places of that layer
shuffle_all   as many weights at random places of all layers
even          the same fraction of every layer, at random places
"""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.allocate import highest_live, keep_highest, kept_counts
from secateur.criteria import random_scores
from secateur.train.updating import Masks

CONTROLS = ("reinit", "shuffle", "shuffle_all", "even")


def control_masks(name: str, masks: Masks, seed: int) -> Masks:
    """The masks of a control, with as many live weights as those of the ticket; the same for the same seed."""
    if name == "reinit":
        return masks
    drawn = {layer: _drawn(f"{name}:{layer}", mask, seed) for layer, mask in masks.items()}
    live, total = sum(int(m.sum()) for m in masks.values()), sum(m.numel() for m in masks.values())
    if name == "shuffle_all":
        return keep_highest(drawn, 1.0 - live / total, scope="global")
    if name == "shuffle":
        counts = {layer: int(mask.sum()) for layer, mask in masks.items()}
    else:
        counts = kept_counts({layer: tuple(mask.shape) for layer, mask in masks.items()}, 1.0 - live / total, "uniform")
    return {
        layer: highest_live(scores.reshape(-1), counts[layer]).reshape(scores.shape) for layer, scores in drawn.items()
    }


def _drawn(name: str, mask: Tensor, seed: int) -> Tensor:
    # in float64, in which no two are alike
    return random_scores(name, seed, tuple(mask.shape)).to(mask.device, torch.float64)
