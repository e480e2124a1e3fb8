"""Repair: what the kept part does to make up for the removed part."""

from secateur.heal.bias import BiasHealer, Healer, mean_bias
from secateur.heal.obs import (
    inverse_factor,
    inverse_hessian,
    obs_sweep,
    refit_without,
    removal_losses,
    sweep_flops,
)
from secateur.heal.starting import start_anew

__all__ = [
    "BiasHealer",
    "Healer",
    "inverse_factor",
    "inverse_hessian",
    "mean_bias",
    "obs_sweep",
    "refit_without",
    "removal_losses",
    "start_anew",
    "sweep_flops",
]
