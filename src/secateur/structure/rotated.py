"""What is left of a decoder whose hidden states have narrower bases, counted from its anatomy."""

from __future__ import annotations

from collections.abc import Collection

from secateur.structure.anatomy import Anatomy


def rotated_size(anatomy: Anatomy, layer: int, signals: Collection[str], size: int, width: int) -> int:
    """Linear weights of a block whose ``signals`` keep ``width`` of ``size`` directions, shortcuts counted in.

    ``signals`` name what has a basis, such as ``layers.3.attention``; the products between the bases stand on the
    shortcuts.
    """
    last, parallel = f"layers.{layer}.mlp" not in signals, f"layers.{layer}.attention" not in signals
    readers = {group.reader: group.kind for group in anatomy.groups if group.layer == layer}
    left = width * (size if last else width) + (0 if parallel else width * width)
    for matrix in anatomy.matrices:
        if matrix.layer == layer:
            outputs, inputs = matrix.shape
            kind = readers.get(matrix.module)
            # what the last block adds to is in the dense basis
            dense = last and (kind == "neuron" or (parallel and kind is not None))
            left += outputs * inputs if dense else width * (outputs if kind is None else inputs)
    return left
