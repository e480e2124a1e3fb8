"""What a cache takes, from shapes alone: no prompt is read and no weight is looked at.

How many tokens stay is asked of the method, which needs shapes only; what they take is counted on rows of noise that go
through the storage itself. So the number is that of ``report()`` to within the tail of a block or a tile.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from secateur.cache.layer import CompressedLayer, Steps
from secateur.cache.report import held_bytes
from secateur.cache.tiles import BLOCK
from secateur.methods import Prompt
from secateur.methods.caching import CacheMethod, EvictionMethod

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Shapes: K key-value heads, S tokens of the prompt, E head dimension.

MOST_ROWS = 8192
"""rows of noise that are really stored; what more of them take is a straight line"""


@dataclass(frozen=True)
class LayerShape:
    """One layer: key-value heads, widths of a key and of a value, and the tokens of its sliding window, if any."""

    heads: int
    key_width: int
    value_width: int
    window: int | None = None


@dataclass(frozen=True)
class CacheShape:
    """The cache of a model: its layers and the dtype of its numbers."""

    layers: tuple[LayerShape, ...]
    dtype: torch.dtype

    def dense_bytes(self, tokens: int, batch: int = 1) -> int:
        """What a dense cache of so many tokens takes."""
        return batch * sum(self._layer_bytes(layer, tokens) for layer in self.layers)

    def largest_layer(self, tokens: int, batch: int = 1) -> int:
        """The same of the largest layer alone: one layer at a time is dense while a prompt is read."""
        return batch * max(self._layer_bytes(layer, tokens) for layer in self.layers)

    def _layer_bytes(self, layer: LayerShape, tokens: int) -> int:
        rows = tokens if layer.window is None else min(tokens, layer.window)
        return layer.heads * rows * (layer.key_width + layer.value_width) * self.dtype.itemsize


def cache_shape(model: PreTrainedModel) -> CacheShape:
    """The shapes that one token leaves in the cache of ``model``, which may be without weights (on the meta device)."""
    from transformers.cache_utils import DynamicCache

    from secateur.cache.hooks import cache_argument

    if any(parameter.is_meta for parameter in model.parameters()):
        model = copy.deepcopy(model).to("meta")  # type: ignore[arg-type]
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    table: Any = model.get_input_embeddings()
    # an embedding instead of a token, whose number some models look at: on the meta device there is none
    given: dict[str, Any] = {"inputs_embeds": table.weight.new_zeros(1, 1, table.weight.shape[-1])}
    with torch.no_grad():
        model(use_cache=True, **given, **{cache_argument(model.forward): cache})
    layers, dtype = [], model.dtype
    for layer in cache.layers:
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is None or values is None:
            continue  # linear attention keeps a state of fixed size
        window = getattr(layer, "sliding_window", None) if getattr(layer, "is_sliding", False) else None
        layers.append(LayerShape(keys.shape[1], keys.shape[-1], values.shape[-1], window))
        dtype = keys.dtype
    return CacheShape(tuple(layers), dtype)


def predicted_bytes(methods: Sequence[CacheMethod], shape: CacheShape, tokens: int, batch: int = 1) -> int:
    """What a cache that ``methods`` compress holds behind a prompt of so many tokens."""
    steps, count = Steps.of(tuple(methods)), len(shape.layers)
    known: dict[tuple[int | None, LayerShape], int] = {}
    total = 0
    for index, layer in enumerate(shape.layers):
        if layer.window is not None or steps.nothing:
            total += shape._layer_bytes(layer, tokens)
            continue
        kept = None if steps.tokens is None else _kept(steps.tokens, layer, index, count, tokens)
        if (kept, layer) not in known:
            known[kept, layer] = layer.heads * _stored(steps, kept, layer, tokens, shape.dtype)
        total += known[kept, layer]
    return batch * total


def _kept(method: EvictionMethod, layer: LayerShape, index: int, layers: int, tokens: int) -> int | None:
    """How many tokens every head keeps; None where nothing is evicted."""
    if tokens <= method.protected:
        return None
    keys = torch.empty(1, layer.heads, tokens, layer.key_width, device="meta")
    values = torch.empty(1, layer.heads, tokens, layer.value_width, device="meta")
    positions = torch.empty(1, tokens, dtype=torch.int64, device="meta")
    prompt = Prompt(
        layer=index, layers=layers, keys=keys, values=values, queries=keys, positions=positions, scaling=1.0
    )
    kept = method.kept(prompt)
    return None if kept >= tokens else kept


def _stored(steps: Steps, kept: int | None, layer: LayerShape, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of one key-value head, beyond ``MOST_ROWS`` by the line through two numbers of rows."""
    rows = tokens if kept is None else kept
    if rows <= MOST_ROWS:
        return _stored_rows(steps, rows, kept is not None, layer, dtype)
    period = _period(steps)
    whole = rows - -(-(rows - MOST_ROWS) // period) * period
    half = whole - MOST_ROWS // 2 // period * period
    low, high = (_stored_rows(steps, count, kept is not None, layer, dtype) for count in (half, whole))
    return high + round((high - low) * (rows - whole) / (whole - half))


def _period(steps: Steps) -> int:
    """Rows that are stored together: whole tiles, and whole blocks of the method unless these are very long.

    Numbers of rows that differ by a multiple of it lie on a line exactly.
    """
    if steps.elements is None:
        return 1
    both = math.lcm(BLOCK, steps.elements.block)
    return both if both <= MOST_ROWS // 4 else BLOCK


def _stored_rows(steps: Steps, rows: int, evicted: bool, layer: LayerShape, dtype: torch.dtype) -> int:
    """Bytes of so many rows of noise, with their positions where other tokens were ``evicted``."""
    generator = torch.Generator().manual_seed(0)
    tokens = rows + evicted
    sides = [torch.randn(1, 1, tokens, w, generator=generator) for w in (layer.key_width, layer.value_width)]
    stored = CompressedLayer(0, 1, replace(steps, tokens=_First(count=rows) if evicted else None))
    keys, values = (side.to(dtype) for side in sides)
    stored.lazy_initialization(keys, values)
    stored.keys, stored.values = keys, values
    stored.seen = stored.prompt = tokens
    call: Any = _Unasked()
    with torch.no_grad():
        stored.compress(keys, None, call, {"scaling": 1.0})
    return held_bytes(stored.tensors().values())


@dataclass(frozen=True, kw_only=True)
class _First(EvictionMethod):
    """Keeps the first ``count`` tokens, whatever they are."""

    count: int = 1

    def keep(self, prompt: Prompt) -> Tensor:
        keep = torch.zeros(prompt.keys.shape[:3], dtype=torch.bool)
        keep[..., : self.count] = True
        return keep


class _Unasked:
    """What a layer asks of the attention module that called it, where there is none: positions, and nothing else."""

    def positions(self, batch: int, tokens: int, device: torch.device) -> Tensor:
        return torch.arange(tokens).expand(batch, -1)

    def __getattr__(self, name: str) -> Any:
        return lambda: None
