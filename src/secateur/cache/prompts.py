"""A prompt that is read once, and from which caches of any kind are made: most of the time goes into reading it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from secateur.cache.compressed import CompressedCache
from secateur.cache.layer import CompressedLayer, Steps
from secateur.methods.cachespec import parse_cache_spec
from secateur.methods.caching import CacheMethod
from secateur.observe.calibration import cached_forward

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _Recording(CompressedLayer):
    """Keeps what its attention was called with instead of compressing anything."""

    def compress(self, query: Tensor, mask: Tensor | None, call: Any, arguments: dict[str, Any]) -> None:
        self.recorded = (query, mask, call, arguments)


@dataclass
class ReadPrompt:
    """What every layer saw of a prompt: keys, values and queries of all its tokens are held."""

    model: PreTrainedModel
    layers: list[Any]

    def compressed(self, methods: tuple[CacheMethod, ...]) -> CompressedCache:
        """The cache that ``methods`` leave of the prompt, as if it were read with it."""
        cache, steps = CompressedCache(methods, self.model), Steps.of(methods)
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
        return cache


def read_prompt(model: PreTrainedModel, ids_BT: Tensor) -> ReadPrompt:
    """Read token ids [sequences, tokens] int64, without padding, dense. Raises UnsupportedModelError."""
    # any method will do, since nothing is compressed; one that does nothing wouldn't be asked
    cache = CompressedCache(parse_cache_spec("knorm:0.5"), model)
    cache.layers = [
        _Recording(layer.index, layer.layers, layer.steps) if isinstance(layer, CompressedLayer) else layer
        for layer in cache.layers
    ]
    with torch.no_grad():
        cached_forward(model, ids_BT.to(model.device), cache)
    return ReadPrompt(model, cache.layers)
