"""What can be cut, and the cutting."""

from secateur.structure.anatomy import Anatomy, Cost, Frozen, Group, Matrix, Slices

__all__ = ["Anatomy", "Cost", "Frozen", "Group", "Matrix", "Slices"]
