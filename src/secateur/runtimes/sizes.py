"""What a runtime must know of a decoder: sizes of every block, biases that do something, rotary frequencies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from secateur.errors import UnsupportedModelError
from secateur.models.decoders import DecoderBlock, matrix_roles, typed_blocks
from secateur.models.layout import rotated_parts
from secateur.models.sources import stored_names

if TYPE_CHECKING:
    from secateur.models.sources import Source


@dataclass(frozen=True)
class Rotary:
    """Rotary embeddings: ``kind`` as transformers names it, and by what the published frequencies are divided.

    ``factors`` [dims / 2] float32 are base frequency / frequency; all ones for ``default``.
    """

    kind: str
    theta: float
    dims: int
    factors: Tensor


@dataclass(frozen=True)
class Sizes:
    """A decoder block by block; ``roles`` are those of ``matrix_roles``, by module."""

    blocks: tuple[DecoderBlock, ...]
    roles: Mapping[str, str]
    hidden: int
    rotary: Rotary | None
    zero_biases: frozenset[str]
    """names of biases of projections that are zero throughout"""
    live_biases: frozenset[str]
    """names of the other biases of projections"""

    @cached_property
    def heads(self) -> list[int]:
        return [block.heads for block in self.blocks]

    @cached_property
    def kv_heads(self) -> list[int]:
        return [block.kv_heads for block in self.blocks]

    @cached_property
    def neurons(self) -> list[int]:
        return [block.neurons for block in self.blocks]

    @property
    def biases(self) -> frozenset[str]:
        """Roles of the projections whose bias is not zero in some layer."""
        return frozenset(self.roles[name.removesuffix(".bias")] for name in self.live_biases)

    @property
    def stray_biases(self) -> bool:
        """Whether a sub-layer that isn't there still adds something."""
        outputs = [block.out for block in self.blocks if not block.heads]
        outputs += [block.down for block in self.blocks if not block.neurons]
        return any(f"{path}.bias" in self.live_biases for path in outputs)

    @property
    def head_dim(self) -> int:
        """Width of a head. Raises UnsupportedModelError for a model without attentions."""
        attending = [block.head_dim for block in self.blocks if block.has_attention]
        if not attending:
            raise UnsupportedModelError("no attention is left, and the runtime has no graph for that")
        return attending[0]

    @property
    def uniform(self) -> bool:
        """Whether all layers have the same sizes."""
        return all(len(set(sizes)) == 1 for sizes in (self.heads, self.kv_heads, self.neurons))

    @property
    def square(self) -> bool:
        """Whether the heads of every layer fill the hidden size."""
        return all(heads * self.head_dim == self.hidden for heads in self.heads)

    def block_of(self, name: str) -> DecoderBlock | None:
        """The block that a module or tensor lies in."""
        return next((block for block in self.blocks if name.startswith(f"{block.name}.")), None)


def sizes_of(source: Source) -> Sizes:
    """Read off the sizes of a decoder; of its weights only biases are looked at.

    Raises UnsupportedModelError for a family without a table entry, and for a model that was rotated.
    """
    model = source.model
    if rotated_parts(model) is not None:
        raise UnsupportedModelError(
            "the blocks turn their hidden states from one basis to another (slicegpt), for which the runtime would need"
            " a product between its residual connections; transformers runs the folder, and onnxruntime its ONNX form"
        )
    blocks, roles = tuple(typed_blocks(model)), matrix_roles(model)
    live: set[str] = set()
    zero: set[str] = set()
    for name in stored_names(model):
        path, _, leaf = name.rpartition(".")
        if leaf == "bias" and path in roles:
            (live if bool(source.tensor(name).any()) else zero).add(name)
    return Sizes(blocks, roles, model.config.hidden_size, _rotary(model), frozenset(zero), frozenset(live))


def _rotary(model: Any) -> Rotary | None:
    parameters = getattr(model.config, "rope_parameters", None)
    embedding = getattr(model.base_model, "rotary_emb", None)
    if not parameters or embedding is None:
        return None
    # Gemma 3 has one set of frequencies for layers that see everything, and one for those with a window
    nested = "full_attention" in parameters
    parameters = parameters["full_attention"] if nested else parameters
    # those that no layer uses aren't there
    own = getattr(embedding, "full_attention_inv_freq" if nested else "inv_freq", None)
    frequencies = next(embedding.buffers()) if own is None else own
    dims, theta = 2 * len(frequencies), float(parameters["rope_theta"])
    base = theta ** -(torch.arange(0, dims, 2, dtype=torch.float64) / dims)
    factors = torch.ones(dims // 2) if own is None else (base / own.detach().cpu().double()).float()
    return Rotary(parameters.get("rope_type", "default"), theta, dims, factors)
