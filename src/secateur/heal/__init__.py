"""Repair: what the kept part does to make up for the removed part."""

from secateur.heal.bias import BiasHealer, Healer, mean_bias
from secateur.heal.starting import start_anew

__all__ = [
    "BiasHealer",
    "Healer",
    "mean_bias",
    "start_anew",
]
