"""Trials of a search: the model with matrices at chosen levels, and how far it is from the dense one.

What a level makes of a matrix was kept when it was pruned. All candidates go through the blocks together, and neurons
that a level removes are cut out and not multiplied. T tokens of a window, V vocabulary.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import groupby
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from secateur.criteria.fitness import Fitness, FullKL
from secateur.engine.keeping import Keeper
from secateur.engine.together import through, windows_at_once
from secateur.models.decoders import is_linear
from secateur.models.sources import Source
from secateur.observe.driver import BlockWalk
from secateur.plans import pack_bits, unpack_bits
from secateur.search import TRIED_BYTES, Levels
from secateur.structure import Group, Matrix
from secateur.structure.surgery import cut_positions, removed_positions, set_parameter

Progress = Callable[[str, int, int], None]
_GENERATION = "generation"
# of the dense model's predictions; when there is more, those that aren't needed right now are forgotten
_REMEMBERED_BYTES = 1 << 31


def level_tensors(module: str, made: Mapping[int, tuple[Tensor, Tensor | None]]) -> dict[str, Tensor]:
    """What is kept of the levels of a matrix: packed masks, and new values, none where the old ones stay.

    ``made`` is, by level, the mask [outputs, inputs] bool with True = kept, and the new weight or None.
    """
    tensors = {}
    for level, (keep, weight) in made.items():
        tensors[f"{module}/{level}/mask"] = pack_bits(keep)
        tensors[f"{module}/{level}/values"] = torch.empty(0) if weight is None else weight[keep].cpu()
    return tensors


def level_weight(keeper: Keeper, module: str, level: int, dense_OI: Tensor) -> tuple[Tensor, Tensor]:
    """(mask, weight), [outputs, inputs] both, that ``level_tensors`` were made of, where the dense weight lies."""
    keep_OI = unpack_bits(keeper.ranked(f"{module}/{level}/mask"), tuple(dense_OI.shape)).to(dense_OI.device)
    values = keeper.ranked(f"{module}/{level}/values")
    if not values.numel():
        return keep_OI, dense_OI * keep_OI
    values = values.to(dense_OI.device, dense_OI.dtype)
    return keep_OI, torch.zeros_like(dense_OI).masked_scatter_(keep_OI, values)


class LevelTrials:
    """Trials on ``ids`` [windows, tokens] int64, of matrices whose levels ``keeper`` has.

    ``fitness`` compares predictions with those of the dense model. ``groups`` are those whose units levels remove, by
    the matrix that reads them. What is finished is noted in ``keeper``.
    """

    def __init__(
        self,
        source: Source,
        matrices: Sequence[Matrix],
        ids: Tensor,
        keeper: Keeper,
        *,
        dtype: torch.dtype,
        generations: int,
        progress: Progress,
        fitness: Fitness | None = None,
        groups: Iterable[Group] = (),
    ) -> None:
        self._source, self._matrices, self._keeper, self._dtype = source, matrices, keeper, dtype
        self._ids = ids.to(source.device)
        self._generations, self._progress = generations, progress
        self._fitness = fitness or FullKL()
        each = self._fitness.kept_bytes(ids.shape[1], source.model.config.get_text_config().vocab_size)
        self._most = _REMEMBERED_BYTES // max(each, 1)
        self._places: dict[int, list[int]] = defaultdict(list)
        for i, matrix in enumerate(matrices):
            self._places[matrix.layer].append(i)
        self._cut = {group.reader: group for group in groups if self._can_be_cut(group)}
        self._remembered: dict[tuple[int, int], Any] = {}
        self._found: dict[tuple[Levels, tuple[tuple[int, int], ...]], float] = {}

    def losses(self, candidates: Sequence[Levels], tokens: int, seed: int) -> list[float]:
        """See ``Trials``: means over predictions; the last one of a window, which nothing follows, is left out."""
        windows = self._windows(tokens, seed)
        key = tuple(windows)
        new = [one for one in dict.fromkeys(candidates) if (one, key) not in self._found]
        if new:
            if len({*self._remembered, *windows}) > self._most:
                self._remembered = {w: kept for w, kept in self._remembered.items() if w in windows}
            totals = dict.fromkeys(new, 0.0)
            for length, some in groupby(windows, lambda window: window[1]):
                chosen = [place for place, _ in some]
                at_once = windows_at_once(self._source, self._dtype, TRIED_BYTES, len(new), length)
                for first in range(0, len(chosen), at_once):
                    for one, found in self._part(chosen[first : first + at_once], length, new).items():
                        totals[one] += found * (length - 1)
            predicted = sum(length - 1 for _, length in windows)
            self._found |= {(one, key): total / predicted for one, total in totals.items()}
        return [self._found[one, key] for one in candidates]

    def done(self) -> list[Levels]:
        """See ``Trials``."""
        noted = self._keeper.noted(_GENERATION)
        return [tuple(noted[generation]) for generation in sorted(noted)]

    def finish(self, generation: int, parent: Levels) -> None:
        """See ``Trials``."""
        self._keeper.note(_GENERATION, generation, list(parent))
        # other candidates are measured from now on
        self._found = {(one, key): found for (one, key), found in self._found.items() if one == parent}
        self._progress("search", generation + 1, self._generations)

    def _windows(self, tokens: int, seed: int) -> list[tuple[int, int]]:
        """Which windows are read, and how many tokens of each: whole ones, and of the last what is left."""
        length = min(tokens, self._ids.shape[1])
        count = min(-(-tokens // length), len(self._ids))
        chosen = sorted(Random(seed).sample(range(len(self._ids)), count))
        lengths = [min(length, tokens - i * length) for i in range(count)]
        # a single token predicts nothing
        return [one for one in zip(chosen, lengths, strict=True) if one[1] > 1]

    @torch.inference_mode()
    def _part(self, windows: list[int], length: int, candidates: list[Levels]) -> dict[Levels, float]:
        """The sum over some windows of how bad each candidate is on so many tokens of them; NaN is infinitely bad."""
        missing = [window for window in windows if (window, length) not in self._remembered]
        wanted: list[Levels | None] = [*candidates]
        if missing and self._fitness.beside_dense:
            wanted.append(None)
        ids_BT = self._ids[windows, :length]
        walk = BlockWalk(self._source, ids_BT, dtype=self._dtype, batch_tokens=length)
        hidden = through(walk, len(self._source.blocks), wanted, None, self._own, self._at)
        totals = dict.fromkeys(candidates, 0.0)
        for i, window in enumerate(windows):

            def logits_of(one: Levels | None, batch: int = i) -> Tensor:
                return walk.logits(self._head, batch, hidden[one][batch])[0, :-1].float()

            if window in missing:
                self._remembered[window, length] = self._fitness.remember(lambda: logits_of(None))
            kept = self._remembered[window, length]
            for one in candidates:
                bad = self._fitness.of(kept, logits_of(one), ids_BT[i, 1:]) if hidden[one] else math.inf
                totals[one] += bad if math.isfinite(bad) else math.inf
        return totals

    def _own(self, levels: Levels | None, layer: int) -> Levels | None:
        """The levels of the matrices of one block; None for the dense model."""
        return None if levels is None else tuple(levels[i] for i in self._places[layer])

    @contextmanager
    def _at(self, block: nn.Module, layer: int, own: Levels | None) -> Iterator[None]:
        """The working copy of a block with these levels of its matrices as long as this lasts."""
        places = [] if own is None else self._places[layer]
        groups = [self._cut[m.module] for m in (self._matrices[i] for i in places) if m.module in self._cut]
        names = [*(self._matrices[i].tensor for i in places), *(part.tensor for g in groups for part in g.slices)]
        whole = {name: block.get_parameter(name).detach() for name in map(self._inside, dict.fromkeys(names))}
        for i, level in zip(places, own or (), strict=True):
            matrix, name = self._matrices[i], self._inside(self._matrices[i].tensor)
            group = self._cut.get(matrix.module)
            if group is not None:
                self._remove(block, group, matrix, level, whole)
                continue
            dense = whole[name]
            weight = level_weight(self._keeper, matrix.module, level, dense.T if matrix.transposed else dense)[1]
            set_parameter(block, name, (weight.T if matrix.transposed else weight).contiguous())
        try:
            yield
        finally:
            for name, tensor in whole.items():
                set_parameter(block, name, tensor)

    def _remove(self, block: nn.Module, group: Group, matrix: Matrix, level: int, whole: Mapping[str, Tensor]) -> None:
        """Cut the units that a level removes out of a working copy; what reads them has its weights from the level."""
        first = self._keeper.ranked(f"{matrix.module}/{level}/mask")[: -(-matrix.shape[1] // 8)]
        keep_I = unpack_bits(first, (matrix.shape[1],))
        gone = (~keep_I[group.columns[:, 0]]).nonzero().flatten()
        positions = removed_positions([group], {group.name: gone})
        for part in group.slices:
            name = self._inside(part.tensor)
            set_parameter(block, name, cut_positions(whole[name], part.tensor, positions))
        values = self._keeper.ranked(f"{matrix.module}/{level}/values")
        if values.numel():
            dense = whole[self._inside(matrix.tensor)]
            weight = values.to(dense.device, dense.dtype).view(matrix.shape[0], -1)
            set_parameter(block, self._inside(matrix.tensor), weight.T.contiguous() if matrix.transposed else weight)

    def _can_be_cut(self, group: Group) -> bool:
        """Whether a block runs without some units of a group, with no more than its tensors cut.

        Heads are counted elsewhere, too.
        """
        modules = [self._source.model.get_submodule(part.tensor.rpartition(".")[0]) for part in group.slices]
        return group.kind == "neuron" and group.inexact is None and all(map(is_linear, modules))

    @cached_property
    def _head(self) -> nn.Module:
        return self._source.shell(self._dtype, whole=True)

    def _inside(self, name: str) -> str:
        """The name of a tensor within its block."""
        return name.removeprefix(f"{self._source.name}.").partition(".")[2]
