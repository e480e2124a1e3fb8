"""Where the sparsity goes: mask rules for single weights, allocators for units and coupled channels."""

from secateur.allocate.channels import SCOPES as CHANNEL_SCOPES
from secateur.allocate.channels import CostOf, allocate_channels
from secateur.allocate.cropping import crop_scores, fit_shares
from secateur.allocate.densities import erk, global_masks, highest, of_masks, synexp, uniform
from secateur.allocate.levels import Grid, even_start
from secateur.allocate.masks import MaskRule, NofM, PerMatrix, PerRow, lowest_of_all, mask_rule, parse_pattern
from secateur.allocate.programme import Budget, ProgrammeAllocator, choose, measured_losses, score_losses
from secateur.allocate.schedules import NEVER, RAMPS, Constant, Cosine, Exponential, Polynomial, Schedule, Updates
from secateur.allocate.selection import SCOPES, fewest_kept, highest_live, keep_highest, kept_counts
from secateur.allocate.shares import MOST, fit_sparsities, mixed_patterns, normalised, part_of, removed_counts, within
from secateur.allocate.units import (
    Allocator,
    GlobalAllocator,
    ManualAllocator,
    RoundedAllocator,
    UniformAllocator,
)
from secateur.allocate.width import WidthAllocator, best_channels, kept_channels
from secateur.allocate.windows import CountedAllocator, RankedAllocator, Window, WindowAllocator

__all__ = [
    "CHANNEL_SCOPES",
    "NEVER",
    "RAMPS",
    "SCOPES",
    "MOST",
    "Allocator",
    "Budget",
    "Constant",
    "Cosine",
    "CostOf",
    "Exponential",
    "CountedAllocator",
    "GlobalAllocator",
    "Grid",
    "ManualAllocator",
    "MaskRule",
    "NofM",
    "PerMatrix",
    "PerRow",
    "Polynomial",
    "ProgrammeAllocator",
    "RankedAllocator",
    "RoundedAllocator",
    "Schedule",
    "UniformAllocator",
    "Updates",
    "WidthAllocator",
    "Window",
    "WindowAllocator",
    "allocate_channels",
    "best_channels",
    "choose",
    "crop_scores",
    "erk",
    "even_start",
    "fewest_kept",
    "fit_shares",
    "fit_sparsities",
    "global_masks",
    "highest",
    "highest_live",
    "keep_highest",
    "kept_channels",
    "kept_counts",
    "lowest_of_all",
    "mask_rule",
    "measured_losses",
    "mixed_patterns",
    "normalised",
    "of_masks",
    "parse_pattern",
    "part_of",
    "removed_counts",
    "score_losses",
    "synexp",
    "uniform",
    "within",
]
