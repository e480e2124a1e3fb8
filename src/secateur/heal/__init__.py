"""Repair: what the kept part does to make up for the removed part."""

from secateur.heal.bias import BiasHealer, Healer, mean_bias
from secateur.heal.obs import inverse_factor, obs_sweep, sweep_flops
from secateur.heal.starting import start_anew

__all__ = ["BiasHealer", "Healer", "inverse_factor", "mean_bias", "obs_sweep", "start_anew", "sweep_flops"]
