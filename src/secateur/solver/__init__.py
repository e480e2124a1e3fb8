"""One second-order solver: from H = X^T X and wanted outputs to a mask, weights and a loss; tensors in, tensors out."""

from secateur.solver.admm import admm, admm_flops
from secateur.solver.alps import alps, alps_flops
from secateur.solver.columns import refit_without, removal_losses
from secateur.solver.damping import damping_notes, inverse_factor, inverse_hessian
from secateur.solver.groups import FIRST_ORDER, elimination, elimination_flops, gains, in_rounds, swaps
from secateur.solver.masked import cg_flops, masked_cg, masked_exact, refit, refit_columns, refit_columns_flops
from secateur.solver.obs import downdated, greedy, greedy_bytes, greedy_flops, spread
from secateur.solver.problem import Curvature, Problem
from secateur.solver.sweep import obs_sweep, sweep_flops

__all__ = [
    "FIRST_ORDER",
    "Curvature",
    "Problem",
    "admm",
    "admm_flops",
    "alps",
    "alps_flops",
    "cg_flops",
    "damping_notes",
    "downdated",
    "elimination",
    "elimination_flops",
    "gains",
    "greedy",
    "greedy_bytes",
    "greedy_flops",
    "in_rounds",
    "inverse_factor",
    "inverse_hessian",
    "masked_cg",
    "masked_exact",
    "obs_sweep",
    "refit",
    "refit_columns",
    "refit_columns_flops",
    "refit_without",
    "removal_losses",
    "spread",
    "swaps",
    "sweep_flops",
]
