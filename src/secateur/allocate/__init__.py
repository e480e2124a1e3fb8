"""Where the sparsity goes: mask rules for single weights, allocators for units and coupled channels."""

from secateur.allocate.channels import SCOPES as CHANNEL_SCOPES
from secateur.allocate.channels import allocate_channels
from secateur.allocate.masks import MaskRule, NofM, PerMatrix, PerRow, lowest_of_all, mask_rule, parse_pattern
from secateur.allocate.units import Allocator, GlobalAllocator, ManualAllocator, UniformAllocator

__all__ = [
    "CHANNEL_SCOPES",
    "Allocator",
    "GlobalAllocator",
    "ManualAllocator",
    "MaskRule",
    "NofM",
    "PerMatrix",
    "PerRow",
    "UniformAllocator",
    "allocate_channels",
    "lowest_of_all",
    "mask_rule",
    "parse_pattern",
]
