"""Applying a plan to a decoder: masks, new values and biases, then physical removal; the config follows."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from secateur.errors import PlanMismatchError, UsageError
from secateur.models.decoders import (
    DecoderBlock,
    decoder_anatomy,
    decoder_blocks,
    is_linear,
    is_transposed,
    typed_blocks,
)
from secateur.models.fingerprint import fingerprint
from secateur.models.modeling_secateur import adopt, skip
from secateur.models.rotation import rotate_model
from secateur.models.sources import Source
from secateur.models.vocabulary import renumber
from secateur.plans import Plan
from secateur.provenance import Fingerprint
from secateur.structure import HIDDEN, Anatomy, Group
from secateur.structure.lexicon import VOCABULARY
from secateur.structure.surgery import complement, cut_positions, removed_positions, set_parameter, zero_positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# config entries that hold one value per decoder block
_PER_LAYER_LISTS = ("layer_types", "no_rope_layers", "attention_layers", "mlp_layer_types")


def apply_plan(plan: Plan, model: PreTrainedModel, *, inplace: bool = False, mask: bool = False) -> PreTrainedModel:
    """See ``secateur.apply``. Masks and values come first, in dense coordinates, then groups are cut."""
    check_fits(plan, fingerprint(Source(model)))
    model = model if inplace else copy.deepcopy(model)
    return cut_model(plan, model, mask=mask)


def cut_model(plan: Plan, model: PreTrainedModel, *, mask: bool = False) -> PreTrainedModel:
    """Cut ``model`` in place. On the meta device it gets the shapes and the config of the cut model."""
    if plan.rotations:
        if mask:
            raise UsageError("a plan that rotates hidden states has no masked form: apply it without mask")
        rotate_model(model, plan.rotations)
        return model
    cut = Cut(plan, model)
    with torch.no_grad():
        for name in cut.touched:
            old = _parameter(model, name)
            new = cut.tensor(name, old, _weight_of(model, name), mask=mask)
            if old is not None and old.shape == new.shape:
                if new is not old:
                    old.copy_(new)
            else:
                set_parameter(model, name, new.contiguous())
    if mask:
        _silence(model, cut.removal)
        return model
    _follow(model, cut.removal)
    return model


def remove_units(model: PreTrainedModel, removal: Removal) -> None:
    """Remove units, sub-layers and blocks, in place; config and module sizes follow."""
    for name in dict.fromkeys(name for name, _ in removal.positions):
        new = cut_positions(model.get_parameter(name).detach(), name, removal.positions)
        set_parameter(model, name, new.contiguous())
    _follow(model, removal)


def with_tokens(model: PreTrainedModel, kept: Tensor) -> PreTrainedModel:
    """``model`` with the tokens ``kept`` alone, ascending ids; all but its embedding and head is shared with it."""
    # tensors that copying has already met stay as they are
    shared = copy.deepcopy(model, {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]})
    anatomy = decoder_anatomy(shared)
    removed = {VOCABULARY: complement(kept, anatomy[VOCABULARY].units)}
    remove_units(shared, Removal.of(shared, anatomy, removed))
    return shared


def _follow(model: PreTrainedModel, removal: Removal) -> None:
    for name, kind in removal.skipped.items():
        skip(model, name, kind)
    if removal.tokens is not None:
        renumber(model, removal.tokens)
    blocks = f"{decoder_blocks(model)[0]}."
    if removal.layers:
        _drop_blocks(model, removal.layers)
    if removal.narrower:
        _follow_width(model)
    if removal.skipped or any(name.startswith(blocks) for name, _ in removal.positions):
        _follow_sizes(model)


@dataclass(frozen=True)
class Removal:
    """What leaves a decoder: positions of tensors, by (tensor, dim); sub-layers; and blocks, by their number.

    A group of which no unit stays takes its whole sub-layer along, biases too: ``skipped`` are the modules that leave
    with it, as name → ``attention`` or ``mlp``, and ``silent`` those whose outputs vanish. ``tokens`` are those that
    stay, ascending int64, when the vocabulary is cut; ``narrower`` says that hidden channels leave.
    """

    positions: Mapping[tuple[str, int], Tensor]
    skipped: Mapping[str, str] = field(default_factory=dict)
    silent: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    tokens: Tensor | None = None
    narrower: bool = False

    @classmethod
    def of(cls, model: PreTrainedModel, anatomy: Anatomy, removed: Mapping[str, Tensor]) -> Removal:
        """``removed`` are the units of every group of the anatomy that leave, ascending int64."""
        layers = tuple(removed["layers"].tolist()) if "layers" in removed else ()
        groups = {name: anatomy[name] for name in removed}
        whole = {
            name: group
            for name, group in groups.items()
            if group.reader and len(removed[name]) == group.units and group.layer not in layers
        }
        blocks = typed_blocks(model) if whole else []
        skipped: dict[str, str] = {}
        for group in whole.values():
            block, kind = blocks[group.layer], sublayer_kind(group)
            skipped |= {block.path(name): kind for name in block.sublayer(kind)}
        positions = removed_positions([group for name, group in groups.items() if name not in whole], removed)
        gone = removed.get(VOCABULARY, torch.empty(0))
        tokens = complement(gone, anatomy[VOCABULARY].units) if len(gone) else None
        silent, narrower = tuple(group.reader or "" for group in whole.values()), len(removed.get(HIDDEN, ())) > 0
        return cls(positions, skipped, silent, layers, tokens, narrower)

    def takes(self, name: str) -> bool:
        """Whether a tensor leaves with a sub-layer."""
        return any(name.startswith(f"{module}.") for module in self.skipped)


def sublayer_kind(group: Group) -> str:
    """``attention`` or ``mlp``, for a group of heads or neurons."""
    return "mlp" if group.kind == "neuron" else "attention"


class Cut:
    """What a plan does to each tensor of a dense model of these shapes. Raises PlanMismatchError.

    ``touched`` are the names of the tensors that change or come into being, ``removal`` what leaves.
    """

    def __init__(self, plan: Plan, model: PreTrainedModel, anatomy: Anatomy | None = None) -> None:
        anatomy = anatomy or decoder_anatomy(model, heads=plan.head_unit)
        _check_groups(plan, anatomy)
        self._plan = plan
        self.removal = Removal.of(model, anatomy, {name: plan.removed(name) for name in plan.keep})
        self.positions = self.removal.positions
        touched = dict.fromkeys([*plan.masks, *plan.biases, *(name for name, _ in self.positions)])
        self.touched = [name for name in touched if not self.removal.takes(name)]

    def shape(self, name: str, shape: Iterable[int]) -> tuple[int, ...]:
        """What is left of a tensor of this shape."""
        gone = [self.positions.get((name, dim)) for dim in range(len(tuple(shape)))]
        return tuple(size - (0 if g is None else len(g)) for size, g in zip(shape, gone, strict=True))

    def tensor(self, name: str, old: Tensor | None, weight: Tensor, *, mask: bool = False) -> Tensor:
        """The tensor ``name`` as it is in the cut model; ``old`` is None for a bias that the dense one lacks.

        ``weight`` is the weight of its module, which tells dtype and device. With ``mask`` the shape stays.
        """
        new = old
        if name in self._plan.masks:
            assert old is not None
            new = _masked(self._plan, name, old)
        if name in self._plan.biases:
            bias = self._plan.biases[name].to(weight.device)
            new = (bias + (old.float() if old is not None else 0.0)).to(weight.dtype)
        assert new is not None
        if mask:
            return zero_positions(new, name, self.positions)
        return cut_positions(new, name, self.positions)


def check_fits(plan: Plan, mine: Fingerprint) -> None:
    """Refuse a plan for other shapes; warn when the shapes fit and the weights are others."""
    if mine.shapes != plan.model.shapes:
        raise PlanMismatchError(
            f"the plan was made for {plan.model.name} ({plan.model.architecture}, {plan.model.num_layers} layers) and"
            f" doesn't fit {mine.name} ({mine.architecture}, {mine.num_layers} layers): their tensors have other shapes"
        )
    if mine.weights != plan.model.weights:
        warnings.warn(f"the plan was made for other weights of the same shapes than those of {mine.name}", stacklevel=3)


def _check_groups(plan: Plan, anatomy: Anatomy) -> None:
    for name, units in plan.groups.items():
        if name not in anatomy or anatomy[name].units != units:
            raise PlanMismatchError(f"the plan cuts {name} with {units} units, which this model doesn't have")
        kept = len(plan.keep[name])
        # what is frozen unit by unit may still leave as a whole sub-layer
        leaves = kept == 0 and anatomy[name].reader is not None
        if anatomy[name].frozen and kept != units and not leaves:
            raise PlanMismatchError(f"the plan cuts {name}, which must stay: {anatomy[name].frozen}")


def _masked(plan: Plan, name: str, weight: Tensor) -> Tensor:
    if weight.is_meta:
        return weight
    mask = plan.masks[name].to(weight.device)
    if name in plan.values:
        weight = weight.masked_scatter(mask, plan.values[name].to(weight.device, weight.dtype))
        return weight.masked_fill_(~mask, 0)
    return weight.masked_fill(~mask, 0)


def _parameter(model: PreTrainedModel, name: str) -> Tensor | None:
    path, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(path), leaf, None)


def _weight_of(model: PreTrainedModel, name: str) -> Tensor:
    return model.get_parameter(name.rpartition(".")[0] + ".weight")


def _silence(model: PreTrainedModel, removal: Removal) -> None:
    """Zero what the blocks and sub-layers that leave add to the residual stream."""
    names = list(removal.silent)
    for layer in removal.layers:
        block = typed_blocks(model)[layer]
        names += [block.out] if block.has_attention else []
        names += [block.down] if block.has_mlp else []
    with torch.no_grad():
        for name in names:
            for parameter in model.get_submodule(name).parameters():
                parameter.zero_()


def _drop_blocks(model: PreTrainedModel, layers: Iterable[int]) -> None:
    name, blocks = decoder_blocks(model)
    gone = set(layers)
    kept = [i for i in range(len(blocks)) if i not in gone]
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, nn.ModuleList(blocks[i] for i in kept))
    for new, old in enumerate(kept):
        for module in blocks[old].modules():
            if getattr(module, "layer_idx", None) == old:
                module.layer_idx = new  # type: ignore[assignment]
    shorten_config(model.config, kept)


def shorten_config(config: Any, kept: list[int]) -> None:
    overrides = layer_overrides(config)
    for key in _PER_LAYER_LISTS:
        values = getattr(config, key, None)
        if isinstance(values, list) and len(values) == config.num_hidden_layers:
            setattr(config, key, [values[i] for i in kept])
    config.per_layer_config = None
    config.num_hidden_layers = len(kept)
    if overrides:
        config.per_layer_config = {new: overrides[old] for new, old in enumerate(kept) if old in overrides}


def layer_overrides(config: Any) -> dict[int, dict[str, Any]]:
    """The per-layer config entries that are set, by layer; empty for a uniform model."""
    stored = config.to_dict().get("per_layer_config") or {}
    return {int(layer): dict(entries) for layer, entries in stored.items()}


def _follow_width(model: PreTrainedModel) -> None:
    """Let config and modules say how many hidden channels there are, once everything has been cut to them."""
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    dense, width = embedding.embedding_dim, embedding.weight.shape[1]
    if head is not None and head.weight.shape[1] != width:
        # a head that was tied still has the old table
        head.weight, head.in_features = embedding.weight, width
    embedding.embedding_dim = width
    for holder in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        holder.hidden_size = width
    for module in model.modules():
        for name in ("hidden_size", "embed_dim"):
            if vars(module).get(name) == dense:
                setattr(module, name, width)


def _follow_sizes(model: PreTrainedModel) -> None:
    """Bring module attributes and the config in line with the shapes of the cut weights."""
    blocks = typed_blocks(model)
    family, config = blocks[0].family, model.config
    sizes = [layer_sizes(block) for block in blocks]
    attending = [block for block in blocks if block.has_attention]
    for block in attending:
        set_attributes(block)
    if family.plain_heads and attending:
        config.head_dim = attending[0].head_dim
    config.per_layer_config = None
    for key in dict.fromkeys(key for entry in sizes for key in entry):
        values = {entry[key] for entry in sizes if key in entry}
        if len(values) == 1 and (family.plain_heads or key == family.ffn_key):
            setattr(config, key, values.pop())
    overrides: dict[int | str, dict[str, Any]] = {}
    for layer, entry in enumerate(sizes):
        overrides[layer] = {key: size for key, size in entry.items() if getattr(config, key) != size}
    config.per_layer_config = {i: e for i, e in overrides.items() if e} or None
    adopt(model, config)
    _declare_biases(model, blocks)


def layer_sizes(block: DecoderBlock) -> dict[str, int]:
    """The config entries that say how wide a block is; none of a sub-layer that has left."""
    family = block.family
    entries = {family.heads_key: block.heads} if block.has_attention else {}
    if block.has_mlp:
        entries[family.ffn_key] = block.neurons
    if block.has_attention and family.kv_heads_key is not None:
        entries[family.kv_heads_key] = block.kv_heads
    return entries


def set_attributes(block: DecoderBlock) -> None:
    """Bring the sizes that modules of a block hold in line with the shapes of its weights.

    What this version of transformers doesn't hold is set where another size has changed: the version that loads the
    checkpoint may read it. A block with all its heads stays as the stock class made it.
    """
    values = {
        "heads": block.heads,
        "kv_heads": block.kv_heads,
        "groups": block.heads // block.kv_heads,
        "width": block.heads * block.head_dim,
    }
    held = []
    for path, what in block.family.sizes:
        parent, _, leaf = path.rpartition(".")
        held.append((block.get(parent), leaf, values[what]))
    changed = any(getattr(module, leaf, value) != value for module, leaf, value in held)
    for module, leaf, value in held:
        if changed or hasattr(module, leaf):
            setattr(module, leaf, value)


def _declare_biases(model: PreTrainedModel, blocks: list[DecoderBlock]) -> None:
    """Where the family has a flag for biases and every layer got one, give the siblings zeros and set the flag.

    The checkpoint then stays one that the stock class loads.
    """
    family, config = blocks[0].family, model.config
    if layer_overrides(config):
        return
    parts = (
        (family.attention_bias_key, family.attention, (*family.qkv, family.out)),
        (family.mlp_bias_key, family.mlp, (*family.up, family.down)),
    )
    if not all(block.has_attention and block.has_mlp for block in blocks):
        return
    for key, path, names in parts:
        if key is None or getattr(config, key, True):
            continue
        modules = [[block.get(path, name) for name in names] for block in blocks]
        if all(row[-1].bias is not None for row in modules):
            for block in blocks:
                _zero_biases(model, block, path, names)
            setattr(config, key, True)


def _zero_biases(model: PreTrainedModel, block: DecoderBlock, path: str, names: tuple[str, ...]) -> None:
    for name in names:
        module = block.get(path, name)
        if is_linear(module) and module.bias is None:
            weight: Tensor = module.weight  # type: ignore[assignment]
            outputs = weight.shape[1 if is_transposed(module) else 0]
            set_parameter(model, f"{block.path(path, name)}.bias", weight.new_zeros(outputs))
