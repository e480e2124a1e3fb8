"""Where the sparsity goes: allocators give every matrix of a decoder its own sparsity; one file each.

An allocator is a frozen dataclass of options. The engine observes the dense model once for what it needs, asks it for
sparsities, and runs the method with them, matrix by matrix.
"""

from secateur.allocators.base import (
    Allocator,
    BlockWeights,
    Follower,
    Measuring,
    Part,
    block_shares,
    check_follows,
    matrix_sparsities,
    of_blocks,
    sizes_of,
    spread_over,
    with_sparsity,
)
from secateur.allocators.registry import (
    allocator,
    chosen_allocation,
    describe_allocator,
    get_allocator,
    list_allocators,
    parse_allocator,
)

__all__ = [
    "Allocator",
    "BlockWeights",
    "Follower",
    "Measuring",
    "Part",
    "allocator",
    "block_shares",
    "check_follows",
    "chosen_allocation",
    "describe_allocator",
    "get_allocator",
    "list_allocators",
    "matrix_sparsities",
    "of_blocks",
    "parse_allocator",
    "sizes_of",
    "spread_over",
    "with_sparsity",
]
