"""How much of a model leaves, before anybody knows what: bytes of the checkpoint, and multiplications per token."""

from __future__ import annotations

from dataclasses import dataclass

from secateur.allocate import part_of
from secateur.estimate.job import Job
from secateur.estimate.sizes import Sizes
from secateur.methods import (
    LayerMethod,
    RotationMethod,
    SearchMethod,
    StructuredMethod,
    SublayerMethod,
    VocabularyMethod,
    WeightMethod,
)
from secateur.structure.lexicon import VOCABULARY
from secateur.structure.rotated import rotated_size


@dataclass(frozen=True)
class Leaving:
    """``stored`` bytes are gone from the checkpoint, and ``multiplied`` weights are not multiplied with any more."""

    stored: int
    multiplied: float


def leaving(sizes: Sizes, job: Job) -> Leaving:
    """What the method of a job takes. Zeros among weights save nothing with dense kernels and files."""
    method = job.method
    if isinstance(method, WeightMethod | SearchMethod):
        return Leaving(0, 0)
    if isinstance(method, LayerMethod):
        layers = removed_layers(sizes, method)
        return Leaving(layers * (sizes.blocks_stored // len(sizes.blocks)), layers / len(sizes.blocks) * sizes.linear)
    if isinstance(method, VocabularyMethod):
        # how many tokens are read too seldom nobody knows before the text is read
        tokens = sizes.anatomy[VOCABULARY]
        gone = 0 if method.min_count else int(method.sparsity * tokens.units)
        return Leaving(gone * tokens.cost.bytes, gone * tokens.cost.macs)
    if isinstance(method, RotationMethod):
        return _by_rotation(sizes, method)
    share = removed_share(sizes, job)
    if method.narrows:
        return Leaving(int(share * sizes.stored), share * (sizes.linear + sizes.head))
    return Leaving(int(share * sizes.linear * sizes.itemsize), share * sizes.linear)


def removed_share(sizes: Sizes, job: Job) -> float:
    """The fraction of the linear weights of the blocks that leaves or is zero, as far as it is known."""
    method = job.method
    if isinstance(method, StructuredMethod):
        return method.share(sizes.anatomy)
    if isinstance(method, SublayerMethod):
        return method.share(2 * len(sizes.blocks))
    return job.sparsity


def removed_layers(sizes: Sizes, method: LayerMethod) -> int:
    """How many blocks leave."""
    return min(method.layers or part_of(len(sizes.blocks), method.sparsity), len(sizes.blocks) - 1)


def _by_rotation(sizes: Sizes, method: RotationMethod) -> Leaving:
    """Tables of tokens get narrower too; a head that was tied to the embedding gets a table of its own."""
    names = sizes.bases if method.slice_head else sizes.bases[:-1]

    def blocks(width: int) -> int:
        return sum(rotated_size(sizes.anatomy, layer, names, sizes.hidden, width) for layer in range(len(sizes.blocks)))

    if not method.sparsity:
        return Leaving(0, 0)
    width = method.width(sizes.hidden, lambda width: blocks(width) / sizes.linear)
    head = sizes.vocabulary * (width if method.slice_head else sizes.hidden)
    tables = sizes.anatomy[VOCABULARY].units * sizes.anatomy[VOCABULARY].cost.params
    gone = sizes.linear - blocks(width)
    stored = gone + tables - sizes.vocabulary * width - head
    return Leaving(stored * sizes.itemsize, gone + sizes.head - head)
