"""Where the sparsity goes: mask rules for single weights, allocators for units."""

from secateur.allocate.masks import MaskRule, NofM, PerMatrix, PerRow, lowest_of_all, mask_rule, parse_pattern
from secateur.allocate.units import Allocator, GlobalAllocator, ManualAllocator, UniformAllocator

__all__ = [
    "Allocator",
    "GlobalAllocator",
    "ManualAllocator",
    "MaskRule",
    "NofM",
    "PerMatrix",
    "PerRow",
    "UniformAllocator",
    "lowest_of_all",
    "mask_rule",
    "parse_pattern",
]
