"""Losses of single samples, [samples]: what a search of masks makes small."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from secateur.search.told import Batch


def token_loss(module: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy of the next token in every window of ids, [windows, tokens]; for language models."""
    ids = batch[0]
    logits = module(input_ids=ids, use_cache=False).logits[:, :-1].float()
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return losses.reshape(len(ids), -1).mean(dim=1)


def class_loss(module: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of a classifier on (inputs, class indices)."""
    inputs, labels = batch
    return F.cross_entropy(module(inputs), labels, reduction="none")
