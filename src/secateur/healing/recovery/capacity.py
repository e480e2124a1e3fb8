"""How much every block may learn: adapters of the same rank everywhere, or of a rank in proportion to what it kept.

    rank_l = rank * keep_l / mean(keep)        in whole numbers of at least 1 whose sum is rank * blocks

The allocator `cfsp` gives keeps in proportion to the importance of blocks, so that this is IG-LoRA (CFSP,
arXiv:2409.13199, §3.3). The paper says that the whole budget stays what it is, and not how it rounds: here the largest
remainders are rounded up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from secateur.errors import UsageError


def guided_ranks(keeps: Sequence[float], rank: int) -> list[int]:
    """Ranks of blocks that kept these fractions; their sum is ``rank`` times the number of blocks."""
    keep = np.asarray(keeps, dtype=np.float64)
    wished = rank * keep / keep.mean()
    found = np.maximum(np.floor(wished), 1).astype(np.int64)
    while (over := int(found.sum()) - rank * len(keep)) != 0:
        sign = 1 if over > 0 else -1
        movable = found - sign >= 1
        found[int(np.where(movable, sign * (found - wished), -np.inf).argmax())] -= sign
    return found.tolist()


def ranks_by_module(shares: Mapping[str, float], blocks: str, modules: Sequence[str], rank: int) -> dict[str, int]:
    """Ranks by the name of a module in the list ``blocks``.

    ``shares`` are the fractions that an allocator took from blocks, by ``layers.3``. Raises UsageError when they are
    not those of these blocks.
    """
    layers = {name: int(name.removeprefix(f"{blocks}.").partition(".")[0]) for name in modules}
    wanted = [f"layers.{layer}" for layer in range(max(layers.values()) + 1)]
    check_guided(follows=set(shares) == set(wanted))
    ranks = guided_ranks([1 - shares[name] for name in wanted], rank)
    return {name: ranks[layer] for name, layer in layers.items()}


def check_guided(*, follows: bool) -> None:
    """Raises UsageError where ranks can't follow, since no allocator gave every block a share."""
    if not follows:
        raise UsageError(
            "ranks=importance follows what an allocator gave every block, and no plan of this model says that: prune"
            " with --method cfsp, or with --allocate cfsp and a method for heads and neurons, or leave it out"
        )
