"""A prompt that is read once, and from which caches of any kind are made: most of the time goes into reading it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from secateur.cache.compressed import CompressedCache, check_tokenizer
from secateur.cache.hooks import decoder_of
from secateur.cache.layer import CompressedLayer, Steps
from secateur.cache.rereading import evict_by_rereading
from secateur.methods.cachespec import parse_cache_spec
from secateur.methods.caching import CacheMethod
from secateur.observe.calibration import cached_forward

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from secateur.methods.rereading import Reader


class _Recording(CompressedLayer):
    """Keeps what its attention was called with instead of compressing anything."""

    def compress(self, query: Tensor, mask: Tensor | None, call: Any, arguments: dict[str, Any]) -> None:
        self.recorded = (query, mask, call, arguments)


@dataclass
class ReadPrompt:
    """What every layer saw of a prompt: keys, values and queries of all its tokens are held."""

    model: PreTrainedModel
    ids: Tensor
    layers: list[Any]
    tokenizer: Reader | None = None

    def compressed(self, methods: tuple[CacheMethod, ...]) -> CompressedCache:
        """The cache that ``methods`` leave of the prompt, as if it were read with it. Raises what that raises."""
        check_tokenizer(methods, self.tokenizer)
        cache, steps = CompressedCache(methods, self.model, self.tokenizer), Steps.of(methods)
        for index, (layer, read) in enumerate(zip(cache.layers, self.layers, strict=True)):
            if not isinstance(read, _Recording):
                cache.layers[index] = copy.deepcopy(read)
                continue
            layer.lazy_initialization(read.keys, read.values)
            layer.keys, layer.values = read.keys.clone(), read.values.clone()
            layer.seen = layer.prompt = read.seen
            if not steps.nothing:
                with torch.no_grad():
                    layer.compress(*read.recorded)
        if cache.pending:
            # what decides on all layers together lets the model read the prompt again
            evict_by_rereading(cache, decoder_of(self.model), self.ids)
        return cache


def read_prompt(model: PreTrainedModel, ids_BT: Tensor, tokenizer: Reader | None = None) -> ReadPrompt:
    """Read token ids [sequences, tokens] int64, without padding, dense; ``tokenizer`` as for ``compressed_cache``.

    Raises UnsupportedModelError.
    """
    # any method will do, since nothing is compressed; one that does nothing wouldn't be asked
    cache = CompressedCache(parse_cache_spec("knorm:0.5"), model)
    cache.layers = [
        _Recording(layer.index, layer.layers, layer.steps) if isinstance(layer, CompressedLayer) else layer
        for layer in cache.layers
    ]
    with torch.no_grad():
        cached_forward(model, ids_BT.to(model.device), cache)
    return ReadPrompt(model, ids_BT.to(model.device), cache.layers, tokenizer)
