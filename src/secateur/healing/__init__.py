"""Repair: what the kept part does to make up for the removed part."""

from secateur.healing.bias import BiasHealer, Healer, mean_bias
from secateur.healing.refit import EXACT_INPUTS, TARGETS, Refit, find, problem_of, with_statistics
from secateur.healing.starting import start_anew

__all__ = [
    "BiasHealer",
    "EXACT_INPUTS",
    "TARGETS",
    "Healer",
    "Refit",
    "find",
    "mean_bias",
    "problem_of",
    "start_anew",
    "with_statistics",
]
