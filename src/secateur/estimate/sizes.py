"""The sizes that an estimate is made of, read off a model whose parameters lie on the meta device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from secateur.models.decoders import decoder_anatomy, family_of, typed_blocks
from secateur.models.rotation import signals
from secateur.models.sources import CheckpointSource, Source
from secateur.structure import Anatomy

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Inputs:
    """One tensor that linear modules of a block read: its ``channels``, and (outputs, inputs) of the modules."""

    channels: int
    matrices: tuple[tuple[int, int], ...]
    reader: bool = False
    """True when its channels are the units of a group (heads of o_proj, neurons of down_proj)"""


@dataclass(frozen=True)
class BlockSizes:
    """One decoder block: entries of all its parameters, bytes as they are stored, and what its modules read."""

    entries: int
    stored: int
    inputs: tuple[Inputs, ...]

    @property
    def matrices(self) -> tuple[tuple[int, int], ...]:
        """(outputs, inputs) of every linear module."""
        return tuple(matrix for inputs in self.inputs for matrix in inputs.matrices)

    @property
    def linear(self) -> int:
        """Entries of the linear weights."""
        return sum(outputs * inputs for outputs, inputs in self.matrices)

    @property
    def widest(self) -> int:
        """Entries of the largest linear weight."""
        return max((outputs * inputs for outputs, inputs in self.matrices), default=0)

    @property
    def outputs(self) -> int:
        """Channels of the widest output of a linear module; 0 where there is none."""
        return max((outputs for outputs, _ in self.matrices), default=0)


@dataclass(frozen=True)
class Sizes:
    """A decoder: its blocks, and what lies outside of them. ``attention`` is the width of all query heads together.

    ``itemsize`` is that of the stored weights, and ``bases`` are the places of bases where hidden states are rotated,
    empty where secateur doesn't know the blocks. ``streamed`` is False for a model that is in memory as a whole, and
    ``loaded`` True when it is there already.
    """

    blocks: tuple[BlockSizes, ...]
    hidden: int
    attention: int
    vocabulary: int
    embedding: int
    outside_entries: int
    outside_stored: int
    head: int
    itemsize: int
    anatomy: Anatomy
    bases: tuple[str, ...] = ()
    streamed: bool = True
    loaded: bool = False

    @property
    def blocks_stored(self) -> int:
        """Bytes of all blocks as they are stored."""
        return sum(block.stored for block in self.blocks)

    @property
    def stored(self) -> int:
        """Bytes of the whole model as it is stored."""
        return self.blocks_stored + self.outside_stored

    @property
    def entries(self) -> int:
        """Entries of all parameters."""
        return sum(block.entries for block in self.blocks) + self.outside_entries

    @property
    def linear(self) -> int:
        """Entries of the linear weights of all blocks."""
        return sum(block.linear for block in self.blocks)


def sizes_of(source: Source, *, streamed: bool | None = None, heads: str = "kv") -> Sizes:
    """The sizes of a source; ``streamed`` says otherwise where its skeleton stands for a model that is loaded whole.

    Raises UnsupportedModelError for a model without decoder blocks.
    """
    model: Any = source.model
    stored = _stored_bytes(source)
    anatomy = decoder_anatomy(model, heads=heads)
    blocks = []
    for layer, block in enumerate(source.blocks):
        prefix = f"{source.name}.{layer}."
        blocks.append(
            BlockSizes(
                entries=sum(p.numel() for p in block.parameters()),
                stored=sum(size for name, size in stored.items() if name.startswith(prefix)),
                inputs=_inputs(model, anatomy, layer, prefix),
            )
        )
    embedding: Tensor = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    return Sizes(
        blocks=tuple(blocks),
        hidden=embedding.shape[1],
        attention=_attention_width(model, embedding.shape[1]),
        vocabulary=embedding.shape[0],
        embedding=embedding.numel() * embedding.element_size(),
        outside_entries=anatomy.total.params - sum(block.entries for block in blocks),
        outside_stored=sum(stored[name] for name in source.outside),
        head=0 if head is None else head.weight.numel(),
        itemsize=next(source.blocks.parameters()).element_size(),
        anatomy=anatomy,
        bases=tuple(signals(model, head=True)) if family_of(model) is not None else (),
        streamed=isinstance(source, CheckpointSource) if streamed is None else streamed,
        loaded=streamed is None and not isinstance(source, CheckpointSource),
    )


def _stored_bytes(source: Source) -> dict[str, int]:
    tensors = source.model.state_dict()
    # the files may be of another dtype than the config says
    files = source.stored if isinstance(source, CheckpointSource) else {}
    return {
        name: tensor.numel() * (files[name].dtype if name in files else tensor.dtype).itemsize
        for name, tensor in tensors.items()
    }


def _inputs(model: Any, anatomy: Anatomy, layer: int, prefix: str) -> tuple[Inputs, ...]:
    """What the modules of a block read, together where the family says that they share it."""
    family = family_of(model)
    owner: dict[str, str] = {}
    if family is not None:
        for part, names in ((family.attention, family.qkv), (family.mlp, family.up)):
            owner |= {".".join(p for p in (part, name) if p): names[0] for name in names}
    readers = {group.reader for group in anatomy if group.layer == layer}
    found: dict[str, list[tuple[str, tuple[int, int]]]] = {}
    for matrix in anatomy.matrices:
        if matrix.layer == layer:
            inside = matrix.module.removeprefix(prefix)
            found.setdefault(owner.get(inside, inside), []).append((matrix.module, matrix.shape))
    return tuple(
        Inputs(shapes[0][1][1], tuple(shape for _, shape in shapes), any(module in readers for module, _ in shapes))
        for shapes in found.values()
    )


def _attention_width(model: Any, hidden: int) -> int:
    """Channels of all query heads together, of the layer that has most of them."""
    if family_of(model) is not None:
        return max((b.heads * b.head_dim for b in typed_blocks(model) if b.has_attention), default=hidden)
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 0) or 0
    return heads * (getattr(config, "head_dim", None) or hidden // max(heads, 1)) or hidden
