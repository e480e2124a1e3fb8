"""The training loop that every training here goes through: recovery of a cut model, and sparse training from a recipe.

``rates`` are learning rates by step, ``order`` the examples of a step, ``loop`` the steps themselves. Nothing that
happens in a step depends on how the process got there, so that a training can be interrupted and goes on to the bit.
"""

from secateur.loop.loop import Callback, Curve, Forgetful, Keeper, Loop, Pace, Progress
from secateur.loop.order import examples_of, step_seed
from secateur.loop.rates import SHAPES, Rate

__all__ = [
    "SHAPES",
    "Callback",
    "Curve",
    "Forgetful",
    "Keeper",
    "Loop",
    "Pace",
    "Progress",
    "Rate",
    "examples_of",
    "step_seed",
]
