"""Searches on a whole model: masks, by a quadratic model of its loss, and levels of its parts, by evolution."""

from secateur.search.descent import CURVATURES, SELECTIONS, Descent, MaskDescent, Move, Searched, step_slots
from secateur.search.evolution import FIXED, TRIED_BYTES, Evolution, Levels, Trials, shifted
from secateur.search.losses import class_loss, token_loss
from secateur.search.policy import Episodes, Policy, PolicySearch, draw_order
from secateur.search.quadratic import CUTOFFS, Quadratic, cut_off, quadratic
from secateur.search.told import Batch, Loss, mean_gradients

__all__ = [
    "CURVATURES",
    "CUTOFFS",
    "FIXED",
    "SELECTIONS",
    "TRIED_BYTES",
    "Batch",
    "Descent",
    "Episodes",
    "Evolution",
    "Levels",
    "Loss",
    "MaskDescent",
    "Move",
    "Policy",
    "PolicySearch",
    "Quadratic",
    "Searched",
    "Trials",
    "class_loss",
    "cut_off",
    "draw_order",
    "mean_gradients",
    "quadratic",
    "shifted",
    "step_slots",
    "token_loss",
]
