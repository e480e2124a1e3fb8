"""Decoders whose hidden states are in another basis behind every sub-layer, of which the first directions are left.

With the norms' scales folded into the weights that read them, RMSNorm(x Q) = RMSNorm(x) Q for an orthogonal Q, so
that what a sub-layer reads and adds may be turned by any Q. In rows x, weights W [outputs, inputs], and bases Q
[hidden, width]:

    reads    W' = W diag(scale) Q          b' = b + W shift
    adds     W' = Q^T M W                  b' = Q^T M b
    between  x S,  S = Q_before^T Q_after

M is the identity; where the norms are layer norms, it subtracts the mean over the hidden entries, from the embedding
too, so that RMSNorm takes their place. The last block gives hidden states of the original basis to the final norm and
the head, which stay as they are, unless there is a basis for it too: then the head reads as the sub-layers do. The head
gets a table of its own where it was tied to the embedding.

Source: S. Ashkboos et al., "SliceGPT", arXiv:2401.15024, §3 and appendix A; the bases come with the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from secateur.errors import PlanMismatchError, UnsupportedModelError
from secateur.models.decoders import decoder_blocks, family_of, is_transposed, typed_blocks, unknown_family
from secateur.models.families import Family, frozen_hidden
from secateur.models.layout import rotated_parts
from secateur.models.modeling_secateur import rotate
from secateur.structure.surgery import set_parameter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EMBEDDING = "embedding"
# of the families whose norms have no shift, relative to the base model
FINAL_NORM = "norm"
WORDS = 4096
"""rows of a table of words that are turned at a time"""


def check_rotatable(model: PreTrainedModel, *, head: bool = False) -> Family:
    """The family of a model whose hidden states, up to those of the head, may change their basis.

    Raises UnsupportedModelError.
    """
    family = family_of(model)
    if family is None:
        raise UnsupportedModelError(unknown_family(model).replace("heads and neurons", "norms and residuals"))
    reason = frozen_hidden(model.config, family)
    if reason is None and rotated_parts(model) is not None:
        reason = "the model has been rotated already"
    if reason is None and not all(block.has_attention and block.has_mlp for block in typed_blocks(model)):
        reason = "some of its sub-layers have left; rotate first"
    if reason is None and head and is_centred(model):
        reason = "the final norm shifts what the head reads, which has no bias for it (leave slice_head out)"
    if reason is not None:
        raise UnsupportedModelError(f"hidden states of {type(model).__name__} must stay in one basis: {reason}")
    return family


def is_parallel(model: PreTrainedModel) -> bool:
    """Whether attention and MLP of a block read the same hidden states."""
    return bool(getattr(model.config, "use_parallel_residual", False))


def signals(model: PreTrainedModel, *, head: bool = False) -> list[str]:
    """The names of the bases: of what enters the first block, and behind sub-layers, the last only for a ``head``."""
    layers = range(len(decoder_blocks(model)[1]))
    names = [f"layers.{layer}.{part}" for layer in layers for part in ("attention", "mlp")]
    if is_parallel(model):
        names = names[1::2]
    return [EMBEDDING, *(names if head else names[:-1])]


def is_centred(model: PreTrainedModel) -> bool:
    """Whether the norms subtract the mean, so that hidden states may be without it."""
    block = typed_blocks(model)[0]
    return isinstance(block.get(block.family.norms[0]), nn.LayerNorm)


def centred(x: Tensor, dim: int = -1) -> Tensor:
    """Without the mean over the hidden entries."""
    return x - x.mean(dim=dim, keepdim=True)


def _turned(table_VD: Tensor, basis_DW: Tensor, first: Callable[[Tensor], Tensor]) -> Tensor:
    """A table of words in another basis, [V, W]; ``first`` changes rows before that.

    In float64, some words at a time: the table is the largest tensor of many a model.
    """
    made_VW = table_VD.new_empty(len(table_VD), basis_DW.shape[1])
    basis_DW = basis_DW.to(table_VD.device)
    for rows, turned in zip(table_VD.split(WORDS), made_VW.split(WORDS), strict=True):
        turned.copy_(first(rows.double()) @ basis_DW)
    return made_VW


def rotate_model(model: PreTrainedModel, rotations: Mapping[str, Tensor]) -> None:
    """Rotate a model in place. On the meta device it gets the shapes and the config of the rotated one."""
    device = next(model.parameters()).device
    rotation = Rotation(model, rotations, lambda name: model.get_parameter(name).detach(), device)
    there = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    outside = {name: tensor.clone() if name == rotation.head else tensor for name, tensor in rotation.outer()}
    added = {}
    with torch.no_grad():
        for name, tensor in rotation.inner():
            # blocks give way one by one, so that there is never a second model
            if name in there:
                set_parameter(model, name, tensor)
            else:
                added[name] = tensor
        model.config.tie_word_embeddings = False
        rotate(model.base_model, rotation.parts)
        for name, tensor in (added | outside).items():
            set_parameter(model, name, tensor)


@dataclass(frozen=True)
class Bases:
    """What turns the hidden states before and behind the sub-layers of a block, [hidden, width] float64.

    ``after`` is None in the last block of a model whose head isn't sliced. Where there is only one residual connection,
    ``between`` is ``after``.
    """

    before: Tensor
    between: Tensor | None
    after: Tensor | None


class Rotation:
    """What bases make of the tensors of a dense model. Raises PlanMismatchError, UnsupportedModelError.

    ``read`` gives a tensor of the dense model by its name; ``device`` is where bases are turned.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        rotations: Mapping[str, Tensor],
        read: Callable[[str], Tensor],
        device: torch.device,
    ) -> None:
        self._last = signals(model, head=True)[-1]
        self.slices_head = self._last in rotations
        self.family, self._read = check_rotatable(model, head=self.slices_head), read
        self._rotations = rotations
        self.parallel, self.centred = is_parallel(model), is_centred(model)
        self._blocks = typed_blocks(model)
        wanted, size = signals(model, head=self.slices_head), model.config.hidden_size
        shapes = {name: tuple(rotations[name].shape) for name in rotations}
        if set(shapes) != set(wanted) or len(set(shapes.values())) != 1 or shapes[EMBEDDING][0] != size:
            raise PlanMismatchError("the plan's bases are not those of this model's hidden states")
        names = {id(module): name for name, module in model.base_model.named_modules()}
        self.prefix = f"{model.base_model_prefix}." if model.base_model is not model else ""
        embedding: Any = model.get_input_embeddings()
        head: Any = model.get_output_embeddings()
        self.embeddings = [names[id(embedding)], *filter(None, [self.family.positions])]
        full = {id(module): name for name, module in model.named_modules()}
        self._table = f"{full[id(embedding)]}.weight"
        self._tied = head is not None and head.weight is embedding.weight
        self._device = device
        self.head = f"{full[id(head)]}.weight" if head is not None else ""
        self.changed = [f"{self.prefix}{name}.weight" for name in self.embeddings]
        self.changed += [self.head] if self.head and (self._tied or self.slices_head) else []
        """what changes outside the blocks, or becomes a tensor of its own"""
        self.parts = {
            "blocks": self.family.blocks,
            "norms": list(self.family.norms),
            "attention": self.family.attention,
            "mlp": list(self.family.chain or [self.family.mlp]),
            "parallel": self.parallel,
            "embeddings": self.embeddings,
            "width": shapes[EMBEDDING][1],
            "size": size,
            # the norm before a head that is sliced
            "final_norm": FINAL_NORM if self.slices_head else "",
        }

    def basis(self, name: str) -> Tensor:
        """One basis, [hidden, width] float64."""
        return self._rotations[name].to(self._device, torch.float64)

    def bases(self, layer: int) -> Bases:
        """Those of one block."""
        before = self.basis(f"layers.{layer - 1}.mlp" if layer else EMBEDDING)
        dense = layer + 1 == len(self._blocks) and not self.slices_head
        after = None if dense else self.basis(f"layers.{layer}.mlp")
        return Bases(before, after if self.parallel else self.basis(f"layers.{layer}.attention"), after)

    def block(self, layer: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a block in the new bases, by their full names; ``tensors`` are all of the dense one's."""
        block, bases, family = self._blocks[layer], self.bases(layer), self.family
        attention = [(family.attention, name) for name in family.qkv]
        mlp = [(family.mlp, name) for name in family.up]
        first, second = family.norms
        made = dict(tensors)
        for norm in family.norms:
            for leaf in ("weight", "bias"):
                made.pop(f"{block.path(norm)}.{leaf}", None)
        between = bases.before if self.parallel else bases.between
        assert between is not None
        for paths, norm, basis in ((attention, first, bases.before), (mlp, second, between)):
            scale, shift = (tensors.get(f"{block.path(norm)}.{leaf}") for leaf in ("weight", "bias"))
            for path in paths:
                self._reads(made, block.path(*path), scale, shift, basis, is_transposed(block.get(*path)))
        for path, basis in (((family.attention, family.out), bases.between), ((family.mlp, family.down), bases.after)):
            if basis is not None:
                self._adds(made, block.path(*path), basis, is_transposed(block.get(*path)))
        like = tensors[f"{block.out}.weight"].dtype
        if not self.parallel:
            made[block.path("attention_shortcut.weight")] = (between.T @ bases.before).to(like)
        after = between if bases.after is None else bases.after.T @ between
        made[block.path("mlp_shortcut.weight")] = after.to(like)
        return {name: tensor.contiguous() for name, tensor in made.items()}

    def outside(self, name: str) -> Tensor:
        """One of ``changed``."""
        if name == self.head:
            table = self._read(self._table if self._tied else self.head)
            if not self.slices_head:
                return table
            scale = self._read(f"{self.prefix}{FINAL_NORM}.weight").double()
            return _turned(table, self.basis(self._last), lambda wide: wide * scale)
        return _turned(self._read(name), self.basis(EMBEDDING), centred if self.centred else lambda wide: wide)

    def inner(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors of the blocks, by name and block by block; a block is read when its turn comes."""
        for layer, block in enumerate(self._blocks):
            names = [f"{block.name}.{name}" for name in block.module.state_dict()]
            yield from self.block(layer, {name: self._read(name) for name in names}).items()

    def outer(self) -> Iterator[tuple[str, Tensor]]:
        """What changes outside of them."""
        for name in self.changed:
            yield name, self.outside(name)

    def _reads(
        self,
        made: dict[str, Tensor],
        path: str,
        scale: Tensor | None,
        shift: Tensor | None,
        basis: Tensor,
        transposed: bool,
    ) -> None:
        stored = made[f"{path}.weight"]
        weight = (stored.T if transposed else stored).double()
        if shift is not None:
            bias = made.get(f"{path}.bias")
            more = weight @ shift.double()
            made[f"{path}.bias"] = (more if bias is None else bias.double() + more).to(stored.dtype)
        weight = weight if scale is None else weight * scale.double()
        weight = (weight @ basis.to(weight.device)).to(stored.dtype)
        made[f"{path}.weight"] = weight.T if transposed else weight

    def _adds(self, made: dict[str, Tensor], path: str, basis: Tensor, transposed: bool) -> None:
        stored, bias = made[f"{path}.weight"], made.get(f"{path}.bias")
        weight = (stored.T if transposed else stored).double()
        weight = centred(weight, dim=0) if self.centred else weight
        turned = basis.to(weight.device).T
        weight = (turned @ weight).to(stored.dtype)
        made[f"{path}.weight"] = weight.T if transposed else weight
        if bias is not None:
            wide = centred(bias.double()) if self.centred else bias.double()
            made[f"{path}.bias"] = (turned @ wide).to(bias.dtype)
