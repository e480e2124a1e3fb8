"""The anatomy of transformer decoders, from the family table and the shapes of the real modules."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from secateur.errors import UnsupportedModelError, UsageError
from secateur.models.families import FAMILIES, Family, frozen_heads, frozen_layers, frozen_width, is_post_norm
from secateur.models.tokens import vocabulary_group
from secateur.provenance import LeftAlone
from secateur.structure import HIDDEN, Anatomy, Cost, Frozen, Group, Matrix, Slices

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def is_linear(module: nn.Module) -> bool:
    """True for nn.Linear (and subclasses) and the Conv1D of GPT-2."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def is_transposed(module: nn.Module) -> bool:
    """True when the weight is stored [inputs, outputs]."""
    return not isinstance(module, nn.Linear)


def is_skipped(module: nn.Module) -> bool:
    """True where an attention or an MLP has left. Remote code brings a class of its own, so none is asked for."""
    return hasattr(module, "skipped")


@dataclass(frozen=True)
class DecoderBlock:
    """One decoder block: its modules by role, and its sizes read off the weights."""

    family: Family
    name: str
    module: nn.Module
    layer: int

    def path(self, part: str, *rest: str) -> str:
        """Full module name of a part of this block; empty parts are skipped."""
        return ".".join(p for p in (self.name, part, *rest) if p)

    def get(self, part: str, *rest: str) -> nn.Module:
        return self.module.get_submodule(".".join(p for p in (part, *rest) if p))

    @property
    def has_attention(self) -> bool:
        """False when the attention has left."""
        return not is_skipped(self.get(self.family.attention))

    @property
    def has_mlp(self) -> bool:
        """False when the MLP has left."""
        return not is_skipped(self.get(self.family.mlp, "" if self.family.mlp else self.family.down))

    def sublayer(self, kind: str) -> tuple[str, ...]:
        """Modules of this block, by their names within it, that leave with its ``attention`` or its ``mlp``."""
        family = self.family
        if kind == "attention":
            return (family.attention,)
        # where the block itself holds the FFN, its matrices stand for it
        return (family.mlp,) if family.mlp else (*family.up, family.down)

    @property
    def out(self) -> str:
        return self.path(self.family.attention, self.family.out)

    @property
    def down(self) -> str:
        return self.path(self.family.mlp, self.family.down)

    @cached_property
    def head_dim(self) -> int:
        attention = self.get(self.family.attention)
        return int(getattr(attention, "head_dim", None) or attention.head_size)  # type: ignore[arg-type]

    @cached_property
    def heads(self) -> int:
        if not self.has_attention:
            return 0
        return features(self.get(self.family.attention, self.family.out))[0] // self.head_dim

    @cached_property
    def kv_heads(self) -> int:
        family = self.family
        if not self.has_attention:
            return 0
        if len(family.qkv) == 3:
            return features(self.get(family.attention, family.qkv[1]))[1] // self.head_dim
        return (features(self.get(family.attention, family.qkv[0]))[1] // self.head_dim - self.heads) // 2

    @cached_property
    def neurons(self) -> int:
        return features(self.get(self.family.mlp, self.family.down))[0] if self.has_mlp else 0


def features(module: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a linear module."""
    rows, columns = module.weight.shape  # type: ignore[misc,union-attr]
    return (int(rows), int(columns)) if is_transposed(module) else (int(columns), int(rows))


def check_decoder(model: Any) -> None:
    """Refuse what is no language model, adapters that aren't merged, and names that ``torch.compile`` has changed.

    Raises UsageError, UnsupportedModelError.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"give a model as secateur.load returns it, not {model!r:.100}")
    # peft puts a layer of its own in the place of each that it adapts
    if any(name.rpartition(".")[2] == "base_layer" for name, _ in model.named_modules()):
        raise UnsupportedModelError(
            f"{type(model).__name__} carries adapters, which no checkpoint of its architecture holds: merge them first,"
            " as merge_and_unload() of peft does"
        )
    if any("_orig_mod" in module._modules for module in model.modules()):
        raise UnsupportedModelError(
            f"{type(model).__name__} holds parts that torch.compile has wrapped, whose parameters have other names than"
            " those of its checkpoint: give it as it was before, or compile with .compile(), which keeps the names"
        )
    if not hasattr(model, "base_model_prefix"):
        raise UsageError(
            f"{type(model).__name__} is no language model of transformers: any other network is traced, with"
            " example_inputs=, and saved with plan="
        )


def family_of(model: PreTrainedModel) -> Family | None:
    """The table entry of this model, or None."""
    return FAMILIES.get(model.config.model_type)


def decoder_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder blocks. Raises UnsupportedModelError when there is no such list."""
    base_name = model.base_model_prefix if model.base_model is not model else ""
    family = family_of(model)
    if family is not None:
        name = ".".join(p for p in (base_name, family.blocks) if p)
        return name, model.get_submodule(name)  # type: ignore[return-value]
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
    lists = [(n, m) for n, m in lists if len({type(b) for b in m}) == 1 and any(map(is_linear, m.modules()))]
    if not lists:
        raise UnsupportedModelError(f"{type(model).__name__} has no list of decoder blocks that secateur could prune")
    return max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))


def typed_blocks(model: PreTrainedModel) -> list[DecoderBlock]:
    """The blocks with their roles. Raises UnsupportedModelError for a model type without a table entry."""
    family = family_of(model)
    if family is None:
        raise UnsupportedModelError(unknown_family(model))
    name, blocks = decoder_blocks(model)
    return [DecoderBlock(family, f"{name}.{i}", block, i) for i, block in enumerate(blocks)]


def matrix_roles(model: PreTrainedModel) -> dict[str, str]:
    """What the matrices of the blocks are for, by module: ``q``, ``k``, ``v`` (or ``qkv``), ``o``, ``gate``, ``up`` (or
    ``gate_up``) and ``down``. Empty for a model type without a table entry.
    """
    if family_of(model) is None:
        return {}
    roles: dict[str, str] = {}
    for block in typed_blocks(model):
        family = block.family
        qkv = ("q", "k", "v") if len(family.qkv) == 3 else ("qkv",)
        up = ("gate", "up") if len(family.up) == 2 else ("gate_up" if family.halves == 2 else "up",)
        # names of what has left do no harm: they are those of no matrix
        roles |= {block.path(family.attention, name): role for name, role in zip(family.qkv, qkv, strict=True)}
        roles |= {block.path(family.mlp, name): role for name, role in zip(family.up, up, strict=True)}
        roles |= {block.out: "o", block.down: "down"}
    return roles


def unknown_family(model: PreTrainedModel) -> str:
    """The sentence for a model type that the table doesn't hold."""
    known = ", ".join(sorted(FAMILIES))
    return f"heads and neurons of model type '{model.config.model_type}' are unknown to secateur (known: {known})"


def turned_blocks(blocks: nn.ModuleList) -> str | None:
    """Why neither blocks nor sub-layers can leave a rotated model: what is behind them reads another basis."""
    if any(hasattr(block, "rotated") for block in blocks):
        return "hidden states change their basis in them (slicegpt); remove them first, and rotate afterwards"
    return None


def decoder_anatomy(model: PreTrainedModel, *, heads: str = "kv") -> Anatomy:
    """See ``secateur.anatomy``."""
    name, blocks = decoder_blocks(model)
    family = family_of(model)
    groups: list[Group] = []
    frozen: list[Frozen] = []
    if family is None:
        frozen.append(Frozen(name, unknown_family(model)))
    else:
        for block in typed_blocks(model):
            groups += [_attention_group(block, model, heads)] if block.has_attention else []
            groups += [_mlp_group(block)] if block.has_mlp else []
    matrices = _matrices(name, blocks)
    reason = frozen_layers(model.config) or turned_blocks(blocks)
    groups.append(_layers_group(name, blocks, reason, post_norm=is_post_norm(model.config)))
    groups.append(vocabulary_group(model))
    groups += [_hidden_group(model)] if family is not None else []
    frozen += [Frozen(g.name, g.frozen) for g in groups if g.frozen]
    return Anatomy(
        model_type=model.config.model_type,
        num_layers=len(blocks),
        groups=tuple(groups),
        matrices=matrices,
        frozen=tuple(frozen),
        blocks=_linear_cost(blocks),
        total=_total_cost(model),
        left_alone=_left_alone(name, blocks),
    )


def qkv_rows(layout: str, heads: int, kv_heads: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of the projection outputs per head: q [heads, head_dim], k and v [kv_heads, head_dim], int64.

    With ``separate`` the rows count within each projection, otherwise within the fused one.
    """

    def rows(starts: Tensor) -> Tensor:
        return starts[:, None] * head_dim + torch.arange(head_dim)

    q, kv = torch.arange(heads), torch.arange(kv_heads)
    if layout == "separate":
        return rows(q), rows(kv), rows(kv)
    if layout == "concatenated":
        return rows(q), rows(heads + kv), rows(heads + kv_heads + kv)
    per_kv = heads // kv_heads
    start = kv * (per_kv + 2)
    queries = (start[:, None] + torch.arange(per_kv)).flatten()
    return rows(queries), rows(start + per_kv), rows(start + per_kv + 1)


def _attention_group(block: DecoderBlock, model: PreTrainedModel, unit: str) -> Group:
    family, heads, kv_heads = block.family, block.heads, block.kv_heads
    if heads % kv_heads:
        raise UnsupportedModelError(
            f"layer {block.layer} has {heads} query heads for {kv_heads} key-value heads, which can't share them evenly"
        )
    q, k, v = qkv_rows(family.qkv_layout, heads, kv_heads, block.head_dim)
    columns = torch.arange(heads * block.head_dim).reshape(heads, block.head_dim)
    if unit == "kv":
        q, columns = q.reshape(kv_heads, -1), columns.reshape(kv_heads, -1)
    parts = [(family.qkv[0], q)] if unit == "query" else list(zip(family.qkv, (q, k, v), strict=False))
    if len(family.qkv) == 1 and unit == "kv":
        parts = [(family.qkv[0], torch.cat([q, k, v], dim=1))]
    slices = [s for name, rows in parts for s in _output_slices(block, (family.attention, name), rows)]
    for norm, rows in zip(family.wide_norms, (q, k), strict=False):
        if not (unit == "query" and rows is k):
            slices.append(Slices(block.path(family.attention, norm) + ".weight", 0, rows))
    slices.append(_input_slices(block, (family.attention, family.out), columns))
    units = kv_heads if unit == "kv" else heads
    kv_bytes = 2 * block.head_dim * _itemsize(block.module) if unit == "kv" else 0
    return Group(
        name=f"layers.{block.layer}.attention",
        kind="kv_head" if unit == "kv" else "head",
        layer=block.layer,
        units=units,
        cost=_unit_cost(block, slices, kv_bytes),
        slices=tuple(slices),
        reader=block.out,
        balance=1 if unit == "kv" else kv_heads,
        parts=heads // kv_heads if unit == "kv" else 1,
        frozen=frozen_heads(model.config),
        inexact="the query and key norms run over all heads, so removed heads change their scale"
        if family.wide_norms
        else None,
    )


def _mlp_group(block: DecoderBlock) -> Group:
    family, neurons = block.family, block.neurons
    rows = torch.arange(neurons)[:, None] + neurons * torch.arange(family.halves)
    slices = [s for name in family.up for s in _output_slices(block, (family.mlp, name), rows)]
    slices.append(_input_slices(block, (family.mlp, family.down), torch.arange(neurons)[:, None]))
    return Group(
        name=f"layers.{block.layer}.mlp",
        kind="neuron",
        layer=block.layer,
        units=neurons,
        cost=_unit_cost(block, slices),
        slices=tuple(slices),
        reader=block.down,
    )


def _output_slices(block: DecoderBlock, path: tuple[str, ...], rows: Tensor) -> list[Slices]:
    module, name = block.get(*path), block.path(*path)
    slices = [Slices(f"{name}.weight", 1 if is_transposed(module) else 0, rows)]
    if module.bias is not None:
        slices.append(Slices(f"{name}.bias", 0, rows))
    return slices


def _input_slices(block: DecoderBlock, path: tuple[str, ...], columns: Tensor) -> Slices:
    module = block.get(*path)
    return Slices(f"{block.path(*path)}.weight", 0 if is_transposed(module) else 1, columns)


def _unit_cost(block: DecoderBlock, slices: list[Slices], kv_bytes: int = 0) -> Cost:
    """Cost of the linear weights that leave with a unit, as ``_linear_cost`` counts those of all blocks."""
    params = 0
    for part in slices:
        tensor = block.module.get_parameter(part.tensor.removeprefix(block.name + "."))
        if tensor.dim() == 2:
            params += part.index.shape[1] * (tensor.numel() // tensor.shape[part.dim])
    return Cost(params, params, params * _itemsize(block.module), kv_bytes)


def _itemsize(module: nn.Module) -> int:
    return next(module.parameters()).element_size()


def _matrices(name: str, blocks: nn.ModuleList) -> tuple[Matrix, ...]:
    found = []
    for layer, block in enumerate(blocks):
        for path, module in block.named_modules():
            if is_linear(module):
                inputs, outputs = features(module)
                found.append(Matrix(f"{name}.{layer}.{path}", layer, (outputs, inputs), is_transposed(module)))
    return tuple(found)


def _left_alone(name: str, blocks: nn.ModuleList) -> tuple[LeftAlone, ...]:
    """Weights of the blocks that are no matrix of a linear module, by name with ``*`` for the number of the block.

    Vectors (norms, biases) aren't counted, as they aren't among the parameters of the matrices either.
    """
    linear = {id(module.weight) for module in blocks.modules() if is_linear(module)}
    found: dict[tuple[str, str], list[int]] = {}
    for path, parameter in blocks.named_parameters():
        if parameter.dim() > 1 and id(parameter) not in linear:
            within = path.partition(".")[2]
            kind = _kind_left_alone(path, parameter, blocks.get_submodule(path.rpartition(".")[0]))
            found.setdefault((f"{name.rpartition('.')[2]}.*.{within}", kind), []).append(parameter.numel())
    return tuple(
        LeftAlone(pattern=pattern, kind=kind, count=len(sizes), params=sum(sizes))
        for (pattern, kind), sizes in found.items()
    )


def _kind_left_alone(path: str, parameter: Tensor, owner: nn.Module) -> str:
    """A plural for people; what the tensor is called in the model is all that is known of it."""
    if isinstance(owner, nn.modules.conv._ConvNd):
        return f"{parameter.dim() - 2}-D convolutions"
    if "expert" in f"{path} {type(owner).__name__}".lower():
        return "fused expert tensors"
    return "stacked matrices" if parameter.dim() > 2 else "matrices outside linear layers"


def _layers_group(name: str, blocks: nn.ModuleList, frozen: str | None, post_norm: bool) -> Group:
    costs = {sum(p.numel() for p in b.parameters()) for b in blocks}
    mean = sum(p.numel() for p in blocks.parameters()) // len(blocks)
    cost = _linear_cost(blocks)
    return Group(
        name="layers",
        kind="layer",
        layer=-1,
        units=len(blocks),
        cost=Cost(mean if len(costs) > 1 else costs.pop(), cost.macs // len(blocks), cost.bytes // len(blocks)),
        frozen=frozen,
        inexact="a norm follows the residual sum, so a silent block still changes its input" if post_norm else None,
    )


def _linear_cost(blocks: nn.ModuleList) -> Cost:
    """Cost of the linear weights of all blocks, biases and norms left out as the published ratios do."""
    sizes = [(m.weight.numel(), m.weight.element_size()) for m in blocks.modules() if is_linear(m)]  # type: ignore[union-attr,operator]
    params = sum(n for n, _ in sizes)
    return Cost(params, params, sum(n * size for n, size in sizes))


def _total_cost(model: PreTrainedModel) -> Cost:
    params = list(model.parameters())
    embedding: Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is embedding
    count = sum(p.numel() for p in params)
    return Cost(count, count if tied else count - embedding.numel(), sum(p.numel() * p.element_size() for p in params))


def _hidden_group(model: PreTrainedModel) -> Group:
    """Hidden channels: an entry of the residual stream, in everything that reads it, scales it or adds to it.

    The slices come in the order of execution.
    """
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    table: Tensor = embedding.weight
    width = int(table.shape[1])
    entries = torch.arange(width)[:, None]
    blocks = typed_blocks(model)
    inner = {part.tensor: part for block in blocks for part in _hidden_slices(block, entries)}
    # what else stands within attentions runs over heads, and within MLPs over neurons
    within = tuple(
        f"{block.path(name)}." for block in blocks for kind in ("attention", "mlp") for name in block.sublayer(kind)
    )
    slices: list[Slices] = []
    sizes: list[int] = []
    unknown = []
    macs = 0
    for name, tensor in model.named_parameters():
        if name in inner:
            macs += tensor.numel() // width if tensor.dim() == 2 else 0
        elif width not in tensor.shape or name.startswith(within):
            continue
        elif not (tensor.dim() == 1 or tensor is table or (head is not None and tensor is head.weight)):
            unknown.append(name)
            continue
        slices.append(inner.get(name) or Slices(name, tensor.dim() - 1, entries))
        sizes.append(tensor.numel() // width)
    reason = frozen_width(model.config)
    if reason is None and unknown:
        reason = f"secateur doesn't know whether {unknown[0]} belongs to the residual stream"
    return Group(
        name=HIDDEN,
        kind=HIDDEN,
        layer=-1,
        units=width,
        cost=Cost(sum(sizes), macs, sum(sizes) * table.element_size()),
        slices=tuple(slices),
        # several config classes want the hidden size to be a multiple of the heads even where these have a width
        multiple=math.gcd(width, next((block.heads for block in blocks if block.has_attention), width)),
        frozen=reason,
        inexact="norms take the mean over all hidden channels, so removed ones change their scale",
    )


def _hidden_slices(block: DecoderBlock, entries: Tensor) -> list[Slices]:
    """What the linear layers of a block hold of the residual stream."""
    family = block.family
    slices: list[Slices] = []
    for there, path, reading, writing in (
        (block.has_attention, family.attention, family.qkv, family.out),
        (block.has_mlp, family.mlp, family.up, family.down),
    ):
        if there:
            slices += [_input_slices(block, (path, name), entries) for name in reading]
            slices += _output_slices(block, (path, writing), entries)
    return slices
