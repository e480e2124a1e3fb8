"""Tokens that leave one layer of a cache: at the end of the prompt, and again while the model decodes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from secateur.cache.rows import DenseRows
from secateur.cache.store import Store
from secateur.errors import NonFiniteError, UsageError
from secateur.finite import all_finite
from secateur.methods.caching import EvictionMethod
from secateur.methods.prompts import Prompt, Rope

if TYPE_CHECKING:
    from secateur.cache.hooks import Call
    from secateur.cache.layer import CompressedLayer

# Shapes: B sequences, H query heads, K key-value heads, S tokens of the prompt, n rows of the tail, W last queries,
# E head dimension.


@dataclass
class Eviction:
    """What a method needs to go on: ``carried`` [B, K, n] float32 of every row, ``queries`` [B, H, W, E] of the last
    tokens with their ``positions`` [B, W] int64 (-1 for padding), ``rope``, and how many tokens came since it looked
    last (``waiting``).

    All of it is None for a method that looks at the prompt alone.
    """

    method: EvictionMethod
    carried: Tensor | None = None
    queries: Tensor | None = None
    positions: Tensor | None = None
    rope: Rope | None = None
    waiting: int = 0

    def at_the_end(self, layer: CompressedLayer, prompt: Prompt) -> None:
        """Remove what leaves of a dense prompt."""
        method, keys = self.method, prompt.keys
        keep = torch.zeros(keys.shape[:3], dtype=torch.bool, device=keys.device)
        if method.every:
            self._start(prompt, layer.padding)
        for sequences, padding, part in _parts(prompt, layer.padding):
            if method.every:
                part = replace(part, carried=self._carry(method.carry(part), sequences, keep))
            if part.tokens <= method.protected:
                if not method.settles:
                    layer.warn_short(method, part.tokens)
                keep[sequences, :, padding:] = True
                continue
            chosen = method.keep(part)
            keep[sequences, :, padding:] = chosen
            moved = method.moved_keys(part, chosen)
            if moved is not part.keys:
                keys = keys.clone() if keys is prompt.keys else keys
                keys[sequences, :, padding:] = moved.to(keys.dtype)
        if method.settles:
            self._settle(layer, keep)
        else:
            self.remove(layer, keys, keep)

    def again(self, layer: CompressedLayer, query: Tensor, call: Call, arguments: dict[str, Any]) -> None:
        """Remove what leaves of a text behind which these queries [B, H, T, E] stand, which have been answered."""
        if layer.store is not None and not self.method.settles:
            raise UsageError(
                f"sequences of this padded batch keep different numbers of tokens by {self.method.name}, so that tokens"
                " can't leave again while decoding: give the cache one sequence at a time"
            )
        method, (batch, _, new, _) = self.method, query.shape
        left = self._left(layer, query, call.positions(batch, new, query.device), arguments, call)
        for name, rows in (("keys", layer.keys), ("values", layer.values), ("queries", query)):
            if not all_finite(rows[:, :, -new:]):
                raise NonFiniteError(
                    f"layer {layer.index}: {name} of token {layer.seen} hold NaN or inf, so nothing can be ranked by"
                    " them"
                )
        blank = torch.zeros(left.keys.shape[:3], dtype=torch.bool, device=query.device)
        before, self.carried = self.carried, None
        for sequences, _, part in _parts(replace(left, carried=before), layer.padding, [0] * batch):
            self._carry(method.carry(part), sequences, blank)
        self._remember(query, left.positions)
        self.waiting += new
        if self.waiting < method.every:
            return
        self.waiting = 0
        unread = [0] * batch
        if self.queries is not None and self.positions is not None:
            left = replace(left, queries=self.queries, positions=self.positions)
            unread = (self.positions < 0).sum(dim=1).tolist()
        keep = blank
        for sequences, padding, part in _parts(replace(left, carried=self.carried), layer.padding, unread):
            keep[sequences, :, padding:] = method.keep_again(part)
        if method.settles:
            self._settle(layer, keep)
        else:
            self.remove(layer, layer.keys, keep)

    def placed_keys(self, layer: CompressedLayer) -> Tensor:
        """The keys as they are attended to, [B, K, n, E]: each is as far from the end as it has rows behind it."""
        if not self.method.closes_gaps or self.rope is None or layer.kept is None:
            return layer.keys
        rows = layer.keys.shape[2]
        from_end = torch.arange(rows, 0, -1, device=layer.keys.device)
        gone = layer.seen - layer.tail_positions() - from_end
        return self.rope.turned(layer.keys, gone).to(layer.keys.dtype)

    # -- what is remembered ----------------------------------------------------------------------------------------

    def _start(self, prompt: Prompt, padding: list[int]) -> None:
        self.rope = prompt.rope
        if self.method.remembered:
            unread = torch.arange(prompt.tokens) < torch.tensor(padding)[:, None]
            self._remember(prompt.queries, prompt.positions.masked_fill(unread.to(prompt.positions.device), -1))

    def _remember(self, queries: Tensor, positions: Tensor) -> None:
        count = self.method.remembered
        if not count:
            return
        if self.queries is not None and self.positions is not None:
            queries = torch.cat([self.queries, queries], dim=2)
            positions = torch.cat([self.positions, positions], dim=1)
        # clones, or all queries of a prompt would be held
        self.queries, self.positions = queries[:, :, -count:].clone(), positions[:, -count:].clone()

    def _carry(self, carried: Tensor | None, sequences: slice, rows: Tensor) -> Tensor | None:
        """Put what is carried of some sequences behind their padding; ``rows`` [B, K, n] gives the shape of all."""
        if carried is not None:
            if self.carried is None:
                self.carried = carried.new_zeros(rows.shape)
            self.carried[sequences, :, rows.shape[2] - carried.shape[2] :] = carried
        return carried

    def _left(
        self, layer: CompressedLayer, query: Tensor, positions: Tensor, arguments: dict[str, Any], call: Call
    ) -> Prompt:
        from secateur.cache.layer import scaling_of

        return Prompt(
            layer=layer.index,
            layers=layer.layers,
            keys=self.placed_keys(layer),
            values=layer.values,
            queries=query,
            positions=positions,
            scaling=scaling_of(query, arguments),
            softcap=arguments.get("softcap"),
            rope=self.rope,
            reader=call.reader(),
            hidden=call.hidden(),
            places=layer.tail_positions(),
        )

    # -- what leaves -----------------------------------------------------------------------------------------------

    def remove(self, layer: CompressedLayer, keys: Tensor, keep: Tensor) -> None:
        """Keep these rows [B, K, n] bool of ``keys`` and of the layer's values."""
        _level(layer, keep)
        # padding that is kept is none that has left
        if bool(keep.all()):
            return
        layer.settled = layer.seen
        lengths = keep.sum(dim=-1).cpu()
        positions = layer.tail_positions()[keep].to(torch.int32)
        values, (batch, heads, _, width) = layer.values, keys.shape
        store = Store(lengths, DenseRows(keys[keep]), DenseRows(values[keep]), positions)
        if store.is_ragged:
            layer.store = store
            layer.keys = keys.new_empty(batch, heads, 0, width)
            layer.values = values.new_empty(batch, heads, 0, values.shape[-1])
            layer.kept = None
            return
        shape = (batch, heads, store.rows)
        layer.keys, layer.values = keys[keep].view(*shape, width), values[keep].view(*shape, values.shape[-1])
        layer.kept = positions.view(shape)
        if self.carried is not None:
            self.carried = self.carried[keep].view(shape)

    def _settle(self, layer: CompressedLayer, keep: Tensor) -> None:
        """Keep these rows of the tail, whose ``protected`` last ones are looked at again, in whatever numbers."""
        recent = min(self.method.protected, layer.keys.shape[2])
        older = layer.keys.shape[2] - recent
        if bool(keep[:, :, :older].all()):
            return
        layer.settled, layer.padding = layer.seen, [max(0, padding - older) for padding in layer.padding]
        layer.settle(keep, recent)
        if self.carried is not None:
            self.carried = self.carried[..., -recent:].clone()

    # -- what happens to the whole cache ---------------------------------------------------------------------------

    def select(self, sequences: Tensor) -> None:
        """These sequences in this order."""
        for name in ("carried", "queries", "positions"):
            held = getattr(self, name)
            setattr(self, name, None if held is None else held[sequences])

    def check_crop(self) -> None:
        """Raises UsageError where the last tokens have left a trace in others."""
        if self.carried is not None and self.method.sums:
            raise UsageError(
                f"{self.method.name} adds up attention while decoding, so that tokens can't be cropped: start with a"
                " copy of the cache from before them"
            )

    def crop(self, tokens: int) -> None:
        """Without the last ``tokens``."""
        self.waiting = max(0, self.waiting - tokens)
        for name, dim in (("carried", 2), ("queries", 2), ("positions", 1)):
            held = getattr(self, name)
            if held is not None:
                stay = max(0, held.shape[dim] - tokens)
                setattr(self, name, held.narrow(dim, 0, stay).clone())

    def tensors(self) -> dict[str, Tensor]:
        """Everything that is held, by name."""
        named = {"carried": self.carried, "queries": self.queries, "positions": self.positions}
        return {f"eviction.{name}": held for name, held in named.items() if held is not None}


def _parts(prompt: Prompt, padding: list[int], unread: list[int] | None = None) -> Iterator[tuple[slice, int, Prompt]]:
    """The batch as a whole where all texts are equally long, or one after the other, without ``unread`` queries."""
    last = prompt.positions[:, -1]
    if not any(padding) and not any(unread or ()) and bool((last == last[0]).all()):
        yield slice(None), 0, prompt
        return
    for b, count in enumerate(padding):
        yield slice(b, b + 1), count, prompt.sample(b, count, None if unread is None else unread[b])


def _level(layer: CompressedLayer, keep: Tensor) -> None:
    """Keep padding of shorter sequences, so that all of a batch are equally long again, if that is enough."""
    counts = keep.sum(dim=-1)
    longest = int(counts.max())
    missing = [longest - int(count) for count in counts[:, 0]]
    if not bool((counts == counts[:, :1]).all()) or any(m > p for m, p in zip(missing, layer.padding, strict=True)):
        layer.padding = [0] * len(layer.padding)
        return
    for b, (count, padding) in enumerate(zip(missing, layer.padding, strict=True)):
        keep[b, :, padding - count : padding] = True
    layer.padding = missing
