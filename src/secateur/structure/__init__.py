"""What can be cut, and the cutting."""

from secateur.structure.anatomy import HIDDEN, Anatomy, Cost, Frozen, Group, Matrix, Slices

__all__ = ["HIDDEN", "Anatomy", "Cost", "Frozen", "Group", "Matrix", "Slices"]
