"""Equations of ``einsum``, with every dimension named."""

from __future__ import annotations

from collections.abc import Sequence
from string import ascii_letters


def spelled(equation: str, ranks: Sequence[int]) -> tuple[list[str], str]:
    """(letters of every operand, letters of the output): ``...`` has letters of its own, and the output is given.

    Raises ValueError where the equation doesn't fit operands of these ``ranks``.
    """
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    operands = inputs.split(",")
    more = {rank - len(o) + 3 for o, rank in zip(operands, ranks, strict=True) if "..." in o}
    free = [letter for letter in ascii_letters if letter not in equation][: max(more, default=0)]
    if not arrow:
        once = sorted(letter for letter in set(inputs) - {",", "."} if inputs.count(letter) == 1)
        output = ("..." if more else "") + "".join(once)
    # the last dimensions of operands are aligned
    found = [
        o.replace("...", "".join(free[len(free) - (rank - len(o) + 3) :]) if "..." in o else "")
        for o, rank in zip(operands, ranks, strict=True)
    ]
    if any(len(letters) != rank for letters, rank in zip(found, ranks, strict=True)):
        raise ValueError(f"{equation!r} doesn't fit operands with {', '.join(map(str, ranks))} dimensions")
    return found, output.replace("...", "".join(free))
