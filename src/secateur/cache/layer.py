"""The cache of one layer: a dense tail that grows, and behind it a store in which something was removed."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from secateur.cache.attention import Visible, left_padding, mixed_attention
from secateur.cache.eviction import Eviction
from secateur.cache.kernels.compression import keep_largest
from secateur.cache.rows import DenseRows, Rows, ThinRows
from secateur.cache.store import Store
from secateur.cache.tiles import BLOCK, LANES_OF, BitmapRows
from secateur.errors import NonFiniteError, UnsupportedModelError, UsageError
from secateur.finite import all_finite
from secateur.methods.caching import CacheChannelMethod, CacheElementMethod, CacheMethod, EvictionMethod
from secateur.methods.prompts import Prompt

if TYPE_CHECKING:
    from secateur.cache.hooks import Call

# Shapes: B sequences, K key-value heads, S tokens of the prompt, t rows of the tail, N rows of all segments, E head
# dimension.


@dataclass
class Steps:
    """What is done to every layer; ``None`` where nothing is."""

    tokens: EvictionMethod | None = None
    channels: CacheChannelMethod | None = None
    elements: CacheElementMethod | None = None

    @classmethod
    def of(cls, methods: tuple[CacheMethod, ...]) -> Steps:
        return cls(**{m.stage: m for m in methods if not m.is_identity})  # type: ignore[arg-type]

    @property
    def nothing(self) -> bool:
        return self.tokens is None and self.channels is None and self.elements is None


class CompressedLayer(DynamicLayer):
    """One layer: ``keys`` and ``values`` [B, K, t, E] are the dense tail, ``store`` holds the rows before it.

    ``kept`` [B, K, rows] int32 are the positions of the first rows of the tail where tokens were evicted; those behind
    them follow each other up to ``seen``, the number of tokens that the layer was given. Some of the first ``settled``
    ones may be gone. ``padding`` counts the rows of every sequence that are padding, at its beginning; ``packed`` those
    of every segment that were pruned and went from the tail into the store. Rows of the tail that hold no token
    (``blank`` says whether there are any) have the position -1, and nothing sees them: in front of sequences of which
    fewer rows are dense than of others.
    """

    keys: Any  # tensors once there is something; the base class says that they may be None
    values: Any

    def __init__(self, index: int, layers: int, steps: Steps) -> None:
        super().__init__()
        self.index, self.layers, self.steps = index, layers, steps
        self._forget()

    def _forget(self) -> None:
        self.store: Store | None = None
        self.kept: Tensor | None = None
        self.seen = 0
        self.prompt = 0
        self.settled = 0
        self.packed = 0
        self.blank = False
        self.pending: Prompt | None = None
        self.eviction = Eviction(self.steps.tokens) if self.steps.tokens is not None else None
        self.padding: list[int] = []
        self.cut: list[int] = []
        self.call: Call | None = None

    # -- what transformers calls -----------------------------------------------------------------------------------

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.call is None:
            raise UsageError(
                "this compressed cache works in the model that it was made for: make one with"
                " secateur.compressed_cache(spec, model)"
            )
        self.seen += key_states.shape[-2]
        return super().update(key_states, value_states)

    def get_seq_length(self) -> int:
        return self.seen

    def reset(self) -> None:
        super().reset()
        self._forget()

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raises ValueError or UsageError where these tokens can't be cropped."""
        if tokens_to_remove > 0:
            raise ValueError("crop takes a negative number: that of the tokens that leave")
        limit = self.seen + tokens_to_remove
        if tokens_to_remove == 0 or not self.is_initialized or limit <= 0:
            return
        if self.evicted and limit < self.settled:
            whose = "of the prompt " if self.settled == self.prompt else ""
            raise UsageError(
                f"tokens {whose}were evicted, so that at most the {self.seen - self.settled} tokens that came"
                f" after that can be cropped, got {-tokens_to_remove}"
            )
        if self.eviction is not None:
            self.eviction.check_crop()

    def crop(self, tokens_to_remove: int) -> None:
        self.check_crop(tokens_to_remove)
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        limit = self.seen + tokens_to_remove
        if limit <= 0:
            self.reset()
            return
        if self.eviction is not None:
            self.eviction.crop(-tokens_to_remove)
        own = self.keys.shape[2] - (self.kept.shape[2] if self.kept is not None else 0)
        leaving = min(-tokens_to_remove, own)
        stay = self.keys.shape[2] - leaving
        self.keys, self.values = self.keys[:, :, :stay].clone(), self.values[:, :, :stay].clone()
        if self.store is not None and leaving < -tokens_to_remove:
            self.store = self.store.before(limit)
            self.packed = max(0, self.packed + tokens_to_remove + leaving)
        self.seen = limit
        self.padding = [min(padding, self._rows()) for padding in self.padding]
        self.cut = [min(cut, self._rows()) for cut in self.cut]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.seen:
            self.batch_select_indices(torch.arange(self.keys.shape[0]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if not self.seen:
            return
        indices = indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices
        here = indices.to(self.keys.device)
        self.keys, self.values = self.keys[here], self.values[here]
        self.set_kept(None if self.kept is None else self.kept[here])
        self.store = None if self.store is None else self.store.batch(indices)
        self.padding = [self.padding[i] for i in indices.tolist()] if self.padding else []
        self.cut = [self.cut[i] for i in indices.tolist()] if self.cut else []
        if self.eviction is not None:
            self.eviction.select(here)

    # -- what it holds ---------------------------------------------------------------------------------------------

    @property
    def evicted(self) -> bool:
        """Whether tokens are gone."""
        return self.kept is not None or (self.store is not None and self.store.positions is not None)

    def _rows(self) -> int:
        """Rows of a segment that are or were in the tail."""
        return self.packed + self.keys.shape[2]

    def set_kept(self, positions: Tensor | None) -> None:
        self.kept = positions
        self.blank = positions is not None and bool((positions < 0).any())

    def tail_positions(self) -> Tensor:
        """Positions of the rows of the tail in the text, [B, K, t] int64; -1 for those that hold no token."""
        batch, heads, rows = self.keys.shape[:3]
        own = rows - (self.kept.shape[2] if self.kept is not None else 0)
        new = torch.arange(self.seen - own, self.seen, device=self.keys.device).expand(batch, heads, own)
        return new if self.kept is None else torch.cat([self.kept.long(), new], dim=-1)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that is held, by name."""
        if not self.is_initialized:
            return {}
        held: dict[str, Tensor] = {"tail.keys": self.keys, "tail.values": self.values}
        held |= {} if self.kept is None else {"tail.positions": self.kept}
        held |= {f"store.{n}": t for n, t in (self.store.tensors() if self.store else {}).items()}
        return held | (self.eviction.tensors() if self.eviction is not None else {})

    # -- attention -------------------------------------------------------------------------------------------------

    def attend(self, query: Tensor, mask: Tensor | None, call: Call, **arguments: Any) -> tuple[Tensor, Tensor | None]:
        """What the attention module gets: dense over the prompt, over what is left of it later."""
        if not self.prompt:
            out = call.base(call.module, query, self.keys, self.values, mask, **arguments)
            self.prompt = self.seen
            if not self.steps.nothing:
                _refuse_unknown(self.index, arguments)
                with torch.no_grad():
                    self.compress(query, mask, call, arguments)
            return out
        if self.pending is not None:
            raise UnsupportedModelError(
                f"the decoder of this model isn't called as a whole, so that it can't read its prompt again for layer"
                f" {self.index}"
            )
        visible = Visible(mask, query.shape[2], self.seen)
        keys = self.keys if self.eviction is None else self.eviction.placed_keys(self)
        # flash kernels mask padding of rectangles that begin with it, and not of what was evicted
        if self.store is not None or (call.is_flash and self.kept is not None and mask is not None):
            _refuse_extras(call, arguments)
            tail, scaling = (keys, self.values), scaling_of(query, arguments)
            softcap = arguments.get("softcap")
            places = self.tail_positions()
            if self.blank:
                visible, places = visible.with_blank(places)
            out = mixed_attention(query, self.store, tail, places, visible, scaling, softcap), None
        else:
            out = self._attend_dense(query, keys, visible, call, arguments)
        if self.eviction is not None and self.eviction.method.every:
            with torch.no_grad():
                self.eviction.again(self, query, call, arguments)
        if self.steps.elements is not None:
            with torch.no_grad():
                self._prune_elements(self.steps.elements)
        return out

    def _attend_dense(
        self, query: Tensor, keys: Tensor, visible: Visible, call: Call, arguments: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        mask = visible.mask
        if self.kept is not None:
            # without a mask, a flash kernel is causal from the end, where the new tokens are
            whole = mask is None and (visible.new == 1 or call.is_flash)
            mask = None if whole else visible.at(self.tail_positions())
            if mask is not None:
                mask = mask.repeat_interleave(query.shape[1] // mask.shape[1], dim=1)
        return call.base(call.module, query, keys, self.values, mask, **arguments)

    # -- at the end of the prompt ----------------------------------------------------------------------------------

    def compress(self, query: Tensor, mask: Tensor | None, call: Call, arguments: dict[str, Any]) -> None:
        """Remove what leaves of a dense prompt, whose attention was called with these queries, mask and arguments."""
        batch, _, tokens = self.keys.shape[:3]
        for name, tensor in (("keys", self.keys), ("values", self.values), ("queries", query)):
            if not all_finite(tensor):
                raise NonFiniteError(f"layer {self.index}: {name} hold NaN or inf, so nothing can be ranked by them")
        self.padding = left_padding(mask, batch, tokens) or [0] * batch
        prompt = Prompt(
            layer=self.index,
            layers=self.layers,
            keys=self.keys,
            values=self.values,
            queries=query,
            positions=call.positions(batch, tokens, self.keys.device),
            scaling=scaling_of(query, arguments),
            softcap=arguments.get("softcap"),
            rope=call.rope() if self.eviction is not None and self.eviction.method.needs_rope else None,
            reader=call.reader(),
            hidden=call.hidden(),
        )
        if self.eviction is not None and self.eviction.method.rereads:
            # queries of all layers are held meanwhile, if they are needed at all
            self.pending = prompt if self.steps.channels is not None else replace(prompt, queries=query[:, :, -1:])
            return
        padding = list(self.padding)
        if self.eviction is not None:
            self.eviction.at_the_end(self, prompt)
        self._prune_rows(prompt, padding)

    def finish(self, keep: Tensor) -> None:
        """Go on after the prompt was read again, with the tokens that stay [B, K, S] bool."""
        prompt, padding, self.pending = self.pending, list(self.padding), None
        assert self.eviction is not None and prompt is not None
        self.eviction.remove(self, self.keys, keep)
        self._prune_rows(prompt, padding)

    def _prune_rows(self, prompt: Prompt, padding: list[int]) -> None:
        if self.steps.channels is not None:
            self._thin(self.steps.channels, prompt, padding)
        if self.steps.elements is not None:
            self._start_elements(self.steps.elements)
            self._prune_elements(self.steps.elements)

    def _as_store(self) -> Store:
        """All rows as a store."""
        if self.store is not None:
            return self.store
        batch, heads, rows = self.keys.shape[:3]
        return Store(
            torch.full((batch, heads), rows),
            DenseRows(self.keys.flatten(0, 2)),
            DenseRows(self.values.flatten(0, 2)),
            self.kept.flatten() if self.kept is not None else None,
        )

    def _windows(self, store: Store, most: int) -> list[int]:
        """How many of its last tokens every sequence keeps as they are: no more than its shortest head has."""
        shortest = store.lengths.amin(dim=1).tolist()
        return [min(most, rows - padding) for rows, padding in zip(shortest, self.padding, strict=True)]

    def _split(self, store: Store, recent: list[int], older: Tensor, keys: Rows, values: Rows) -> None:
        """Rows that are not ``older`` become the tail again; ``keys`` and ``values`` hold the older ones.

        Where sequences have different numbers of ``recent`` rows, blank ones stand in front of them.
        """
        batch, heads = store.lengths.shape
        counts, most = torch.tensor(recent), max(recent)
        there = torch.arange(most) >= most - counts[:, None, None].expand(batch, heads, 1)

        def tail(rows: Tensor, blank: int) -> Tensor:
            made = rows.new_full((batch, heads, most, *rows.shape[1:]), blank)
            made[there.to(rows.device)] = rows[~older]
            return made

        positions = store.positions
        self.keys, self.values = tail(_dense(store.keys), 0), tail(_dense(store.values), 0)
        self.set_kept(None if positions is None else tail(positions, -1))
        left = store.lengths - counts[:, None]
        self.store = Store(left, keys, values, positions[older] if positions is not None else None)

    def settle(self, keep: Tensor, recent: int) -> None:
        """Move the rows of the tail that ``keep`` [B, K, t] marks into the store, all but the ``recent`` last ones."""
        older = self.keys.shape[2] - recent
        keys, values = self.keys[:, :, :older], self.values[:, :, :older]
        if self.store is None:
            batch, heads = keys.shape[:2]
            none, nowhere = torch.zeros(batch, heads, dtype=torch.int64), torch.empty(0, dtype=torch.int32)
            empty = [DenseRows(side.new_empty(0, side.shape[-1])) for side in (keys, values)]
            self.store = Store(none, empty[0], empty[1], nowhere.to(keys.device))
        positions = self.tail_positions()
        self.store = self.store.joined(keys, values, positions[:, :, :older], keep[:, :, :older])
        self.keys, self.values = self.keys[:, :, older:].clone(), self.values[:, :, older:].clone()
        self.kept = None  # what is left of the tail are the last tokens of the text

    def _thin(self, method: CacheChannelMethod, prompt: Prompt, padding: list[int]) -> None:
        store = self._as_store()
        recent = self._windows(store, method.recent)
        if not store.is_ragged:  # padding fills the shorter ones up
            recent = [max(recent)] * len(recent)
        older = _older(store, recent)
        if not bool(older.any()):
            self.warn_short(method, prompt.tokens)
            return
        channels = self._channels(method, prompt, padding, store)
        keys, values = _dense(store.keys)[older], _dense(store.values)[older]
        lengths = (store.lengths - torch.tensor(recent)[:, None]).flatten()
        if method.target == "key":
            self._split(store, recent, older, ThinRows.encode(keys, lengths, channels), DenseRows(values))
        else:
            self._split(store, recent, older, DenseRows(keys), ThinRows.encode(values, lengths, channels))

    def _channels(self, method: CacheChannelMethod, prompt: Prompt, padding: list[int], store: Store) -> Tensor:
        """Channels that stay of every segment, [B * K, C] int64, by the rows that were not evicted.

        ``padding`` is that of the prompt, of which rows may have been evicted too.
        """
        if not store.is_ragged and not any(padding):
            shape = (*store.lengths.shape, store.rows, -1)
            left = replace(prompt, keys=_dense(store.keys).view(shape), values=_dense(store.values).view(shape))
            return method.channels(left).flatten(0, 1)
        found, start = [], 0
        for segment, length in enumerate(store.lengths.flatten().tolist()):
            b, k = divmod(segment, store.lengths.shape[1])
            rows = slice(start + self.padding[b], start + length)  # what is left of the padding lies in front
            one = prompt.sample(b, padding[b]).head(k)
            keys, values = _dense(store.keys)[rows], _dense(store.values)[rows]
            found.append(method.channels(replace(one, keys=keys[None, None], values=values[None, None]))[0, 0])
            start += length
        return torch.stack(found)

    def warn_short(self, method: CacheMethod, tokens: int) -> None:
        """Say, once for all layers, that a prompt stays whole."""
        if self.call is not None:
            warn_once(self.call.warned, short_prompt(method, tokens))

    # -- elements, at the end of the prompt and while decoding -----------------------------------------------------

    def _start_elements(self, method: CacheElementMethod) -> None:
        for side in ("keys", "values"):
            # one bit for every element
            if 0 < 8 * self.keys.element_size() * method.side_sparsity(side) < 1 and self.call is not None:
                grows = f"{method.name} removes less of the {side} than its bitmap takes: the cache grows"
                warn_once(self.call.warned, grows)
        if self.store is not None:
            self._prune_older(self.store, method)
        for b, padding in enumerate(self.padding):
            self.keys[b, :, :padding] = 0
            self.values[b, :, :padding] = 0
        self.cut = list(self.padding)

    def _prune_older(self, store: Store, method: CacheElementMethod) -> None:
        """Prune heads of different lengths; where those of one sequence aren't, as if it were alone.

        There whole blocks leave, and of other sequences all that is older than the window.
        """
        recent = self._windows(store, method.window)
        for b, lengths in enumerate(store.lengths.tolist()):
            if min(lengths) == max(lengths):
                recent[b] = lengths[0] - _in_blocks(method, lengths[0])
        older = _older(store, recent)
        left = store.lengths - torch.tensor(recent)[:, None]
        sides = {"keys": _dense(store.keys)[older], "values": _dense(store.values)[older]}
        for side, rows in sides.items():
            for piece in rows.split(left.flatten().tolist()):
                if len(piece):
                    _prune(method, piece, side)
        self._split(store, recent, older, *(_encoded(method, sides[side], side, left) for side in sides))
        self.padding = [max(recent) - rows for rows in recent]

    def _prune_elements(self, method: CacheElementMethod) -> None:
        """Prune what has left the window in whole blocks, and put it into the store."""
        rows, first = self._rows(), self.packed
        cuts = [p + _in_blocks(method, rows - p) for p in self.padding]
        cuts = [max(pair) for pair in zip(cuts, self.cut, strict=True)]
        if cuts == self.cut:
            return
        together = len({*zip(cuts, self.cut, strict=True)}) == 1
        for b in range(1 if together else len(cuts)):
            sequences = slice(None) if together else slice(b, b + 1)
            self._prune_tail(method, sequences, self.cut[b] - first, cuts[b] - first)
        self.cut = cuts
        ready = min(cuts) - first
        # bits are stored for whole tiles, so that a few rows at a time would take more than they save
        ready = ready if self.seen == self.prompt else ready // BLOCK * BLOCK
        if ready > 0:
            self._pack(method, ready)

    def _prune_tail(self, method: CacheElementMethod, sequences: slice, start: int, stop: int) -> None:
        for side, tail in (("keys", self.keys), ("values", self.values)):
            if stop > start:
                _prune(method, tail[sequences, :, start:stop], side)

    def _pack(self, method: CacheElementMethod, rows: int) -> None:
        """Move the first rows of the tail, which are pruned, into the store."""
        keys, values = self.keys[:, :, :rows], self.values[:, :, :rows]
        positions = self.tail_positions()[:, :, :rows] if self.evicted else None
        if self.store is None:
            batch, heads = keys.shape[:2]
            self.store = Store(
                lengths := torch.full((batch, heads), rows),
                _encoded(method, keys.flatten(0, 2), "keys", lengths),
                _encoded(method, values.flatten(0, 2), "values", lengths),
                None if positions is None else positions.flatten().to(torch.int32),
            )
        else:
            keep = positions >= 0 if self.blank and positions is not None else None
            self.store = self.store.joined(keys, values, positions, keep)
        self.keys, self.values = self.keys[:, :, rows:].clone(), self.values[:, :, rows:].clone()
        self.set_kept(None if self.kept is None else self.kept[:, :, rows:].clone())
        self.packed += rows


def warn_once(warned: set[str], message: str) -> None:
    """One warning per cache, not one per layer; ``warned`` holds those that were given."""
    if message not in warned:
        warned.add(message)
        warnings.warn(message, stacklevel=2)


def short_prompt(method: CacheMethod, tokens: int) -> str:
    """What is said of a prompt that has no more tokens than a method protects."""
    return f"{method.name} leaves a prompt of {tokens} tokens as it is: its window is as long"


def _in_blocks(method: CacheElementMethod, rows: int) -> int:
    """How many of so many rows are pruned: whole blocks that have left the window."""
    return max(0, (rows - method.window) // method.block * method.block)


def _older(store: Store, recent: list[int]) -> Tensor:
    """Which rows are not among the last ``recent`` ones of their segment, [N] bool."""
    lengths = store.lengths.flatten()
    stop = lengths - torch.tensor(recent).repeat_interleave(store.lengths.shape[1])
    owner = torch.arange(len(lengths)).repeat_interleave(lengths)
    rank = torch.arange(len(owner)) - (lengths.cumsum(0) - lengths)[owner]
    return (rank < stop[owner]).to(_dense(store.keys).device)


def _dense(rows: Rows) -> Tensor:
    """The rows before anything is encoded, [N, E]."""
    assert isinstance(rows, DenseRows)
    return rows.x


def _prune(method: CacheElementMethod, x: Tensor, side: str) -> None:
    """Zero what a method removes of ``x`` [..., tokens, E], in place."""
    if method.side_sparsity(side) == 0:
        return
    rule = method.largest(side, x.shape[-1])
    if rule is None or not keep_largest(x, rule):
        x.masked_fill_(~method.element_mask(x, side), 0)


def _encoded(method: CacheElementMethod, rows: Tensor, side: str, lengths: Tensor) -> Rows:
    if method.side_sparsity(side) == 0:
        return DenseRows(rows.clone())
    return BitmapRows.encode(rows, lengths, LANES_OF[side])


def scaling_of(query: Tensor, arguments: dict[str, Any]) -> float:
    """The factor of the logits that the model's attention is called with."""
    given = arguments.get("scaling")
    return query.shape[-1] ** -0.5 if given is None else given


def _refuse_extras(call: Call, arguments: dict[str, Any]) -> None:
    """What the model's own attention would do beside its output, and the one over the store doesn't."""
    if arguments.get("dropout"):
        raise UsageError("a compressed cache is for inference, without dropout: call model.eval() first")
    if arguments.get("output_attentions") and call.implementation == "eager":
        raise UsageError(
            "attention weights aren't kept where channels or elements were removed, or heads hold different tokens:"
            " leave output_attentions out"
        )


def _refuse_unknown(layer: int, arguments: dict[str, Any]) -> None:
    """What an attention function is given beyond queries, keys, values and mask, and the cache doesn't know."""
    for name in ("position_bias", "s_aux", "head_mask"):
        if arguments.get(name) is not None:
            raise UnsupportedModelError(
                f"the attention of layer {layer} takes {name}, which a compressed cache doesn't know"
            )
