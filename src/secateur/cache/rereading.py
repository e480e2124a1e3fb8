"""The model reads its prompt a second time, behind the copy of it that the cache holds; what it reads isn't kept."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from secateur.cache.layer import CompressedLayer, Steps, scaling_of, short_prompt, warn_once
from secateur.errors import UsageError
from secateur.methods.caching import RereadMethod
from secateur.methods.prompts import Prompt
from secateur.methods.rereading import Passage

if TYPE_CHECKING:
    from secateur.cache.compressed import CompressedCache
    from secateur.cache.hooks import Call

# Shapes: B sequences, S tokens of the prompt, Q tokens that are read behind it, K key-value heads.

Look = Callable[[int, Prompt, slice], None]
"""number of a layer, what its attention saw, rows of the passage in it"""


class RereadLayer(CompressedLayer):
    """The dense prompt of one sequence in one layer: what is read behind it is looked at and forgotten."""

    def __init__(self, layer: CompressedLayer, sequence: int, padding: int, first: int, passage: Passage, look: Look):
        super().__init__(layer.index, layer.layers, Steps())
        one = slice(sequence, sequence + 1)
        keys, values = layer.keys[one, :, padding:], layer.values[one, :, padding:]
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values
        self.seen = self.prompt = self.settled = keys.shape[2]
        self.padding, self.cut = [0], []
        self.first, self.passage, self.look = first, passage, look

    def attend(self, query: Tensor, mask: Tensor | None, call: Call, **arguments: Any) -> tuple[Tensor, Tensor | None]:
        out = super().attend(query, mask, call, **arguments)
        with torch.no_grad():
            self.look(self.index, self._read(query, call, arguments), self._passage_rows())
        return out

    def _passage_rows(self) -> slice:
        return slice(self.first, self.first + self.passage.stop - self.passage.start)

    def _read(self, query: Tensor, call: Call, arguments: dict[str, Any]) -> Prompt:
        new = query.shape[2]
        pieces = (slice(self.first), slice(self.passage.start, self.passage.stop), slice(self.prompt, None))
        keys, values = (torch.cat([x[:, :, piece] for piece in pieces], dim=2) for x in (self.keys, self.values))
        return Prompt(
            layer=self.index,
            layers=self.layers,
            keys=keys,
            values=values,
            queries=query,
            positions=call.positions(1, new, query.device),
            scaling=scaling_of(query, arguments),
            softcap=arguments.get("softcap"),
            reader=call.reader(),
            hidden=call.hidden(),
        )


def _of_one(layer: Any, sequence: int, tokens: int) -> Any:
    """A layer of another kind for one sequence of so many tokens, without its padding; the layer stays as it is."""
    other: Any = copy.copy(layer)
    if isinstance(layer, DynamicLayer) and layer.is_initialized:
        one = slice(sequence, sequence + 1)
        other.keys, other.values = other.keys[one, :, -tokens:], other.values[one, :, -tokens:]
        if hasattr(other, "cumulative_length"):
            other.cumulative_length = tokens
    return other


def read_again(
    cache: CompressedCache, model: nn.Module, one: tuple[int, int], passage: Passage, first: int, look: Look
) -> None:
    """Let the model (without its head) read a passage behind the prompt of one sequence; ``look`` sees every layer.

    ``one`` is the number of the sequence and its padding, ``first`` counts the tokens that every passage sees.
    """
    sequence, padding = one
    tokens = next(layer.seen for layer in cache.layers if isinstance(layer, CompressedLayer)) - padding
    other = copy.copy(cache)
    other.layers = [
        RereadLayer(layer, sequence, padding, first, passage, look)
        if isinstance(layer, CompressedLayer)
        else _of_one(layer, sequence, tokens)
        for layer in cache.layers
    ]
    with torch.no_grad():
        model(input_ids=passage.ids[None], use_cache=True, **{cache.argument: other})


def evict_by_rereading(cache: CompressedCache, model: nn.Module, ids: Tensor | None) -> None:
    """Decide on the tokens of all layers and remove them; ``ids`` [B, S] are those of the prompt. Raises UsageError."""
    from secateur.cache.compressed import check_tokenizer

    method = cache.methods[0]
    assert isinstance(method, RereadMethod)
    check_tokenizer(cache.methods, cache.tokenizer)
    if ids is None or ids.shape[1] != cache.get_seq_length():
        raise UsageError(f"{method.name} lets the model read its prompt again and needs its tokens, got inputs_embeds")
    layers = [layer for layer in cache.layers if isinstance(layer, CompressedLayer)]
    keep = [torch.zeros(layer.keys.shape[:3], dtype=torch.bool, device=layer.keys.device) for layer in layers]
    for sequence, padding in enumerate(layers[0].padding):
        text = ids[sequence, padding:]
        if len(text) <= method.protected:
            warn_once(cache.warned, short_prompt(method, len(text)))
            chosen = [torch.ones_like(one[sequence, :, padding:]) for one in keep]
        else:
            chosen = method.keep_of_all(reread_scores(cache, model, method, (sequence, padding), text))
        for one, stays in zip(keep, chosen, strict=True):
            one[sequence, :, padding:] = stays.to(one.device)
    for layer, stays in zip(layers, keep, strict=True):
        layer.finish(stays)


def reread_scores(
    cache: CompressedCache, model: nn.Module, method: RereadMethod, one: tuple[int, int], text: Tensor
) -> list[Tensor]:
    """Scores of every compressed layer, [K, S] float32 each; 0 for the tokens that are protected.

    ``one`` is the number of a sequence and its padding, ``text`` [S] its prompt.
    """
    scores = {
        layer.index: layer.keys.new_zeros((layer.keys.shape[1], len(text)), dtype=torch.float32)
        for layer in cache.layers
        if isinstance(layer, CompressedLayer)
    }
    assert cache.tokenizer is not None
    for passage in method.passages(text, cache.tokenizer):
        _check_room(cache, model, method, len(text) + len(passage.ids))
        where = slice(passage.start, passage.stop)

        def look(index: int, read: Prompt, rows: slice, where: slice = where) -> None:
            scores[index][:, where] = method.reread(read, rows)[0]

        read_again(cache, model, one, passage, method.protected, look)
    return list(scores.values())


def _check_room(cache: CompressedCache, model: Any, method: RereadMethod, tokens: int) -> None:
    """Raises UsageError where positions are learned and end before so many tokens; warns where they turn."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is None or tokens <= limit:
        return
    said = f"{method.name} reads up to position {tokens} to repeat the prompt, and this model was made for {limit}"
    if not any("Rotary" in type(module).__name__ for module in model.modules()):
        raise UsageError(f"{said}: take a shorter prompt, or shorter passages (chunk=...)")
    warn_once(cache.warned, said)
