"""The tokens of a decoder as something that can leave it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from secateur.structure import Cost, Group, Slices
from secateur.structure.lexicon import VOCABULARY

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def vocabulary_group(model: PreTrainedModel) -> Group:
    """Tokens: rows of the embedding and of the head, once where they are tied."""
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    table: Tensor = embedding.weight
    names = {id(module): name for name, module in model.named_modules()}
    held = [(names[id(embedding)], embedding)]
    if head is not None and head.weight is not table:
        held.append((names[id(head)], head))
    rows = torch.arange(len(table))[:, None]
    slices = [Slices(f"{name}.weight", 0, rows) for name, _ in held]
    slices += [Slices(f"{names[id(m)]}.bias", 0, rows) for m in (head,) if getattr(m, "bias", None) is not None]
    # a rotated model has a narrower embedding than head
    params = sum(module.weight.shape[1] for _, module in held) + (len(slices) - len(held))
    return Group(
        name=VOCABULARY,
        kind="vocab",
        layer=-1,
        units=len(table),
        cost=Cost(params, head.weight.shape[1] if head is not None else 0, params * table.element_size()),
        slices=tuple(slices),
        frozen=_frozen_vocabulary(model, embedding, head),
    )


def _frozen_vocabulary(model: PreTrainedModel, embedding: Any, head: Any) -> str | None:
    if not isinstance(embedding, nn.Embedding) or (head is not None and not isinstance(head, nn.Linear)):
        kinds = type(embedding).__name__, type(head).__name__
        return f"secateur knows no tokens in embeddings of the kind {kinds[0]} with a head of the kind {kinds[1]}"
    sizes = {embedding.weight.shape[0], *([head.weight.shape[0]] if head is not None else [])}
    if len(sizes) > 1:
        return "embedding and head have different numbers of tokens"
    if hasattr(model.config.get_text_config(), "vocab_size_per_layer_input"):
        return "further embeddings of the tokens stand beside the first"
    return None
