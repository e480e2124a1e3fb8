"""Searching the mask of a whole model, block of weights by block, on a quadratic model of its loss."""

from secateur.search.descent import CURVATURES, SELECTIONS, Descent, MaskDescent, Move, Searched, step_slots
from secateur.search.losses import class_loss, token_loss
from secateur.search.quadratic import CUTOFFS, Quadratic, cut_off, quadratic
from secateur.search.told import Batch, Loss, mean_gradients

__all__ = [
    "CURVATURES",
    "CUTOFFS",
    "SELECTIONS",
    "Batch",
    "Descent",
    "Loss",
    "MaskDescent",
    "Move",
    "Quadratic",
    "Searched",
    "class_loss",
    "cut_off",
    "mean_gradients",
    "quadratic",
    "step_slots",
    "token_loss",
]
