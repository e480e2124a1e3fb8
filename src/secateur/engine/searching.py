"""Trials of a search: the whole model with matrices at chosen levels, and how far it is from the dense one.

What a level makes of a matrix was kept when it was pruned. The model is in memory as a whole, once; only matrices whose
level has changed are written before a trial. T tokens of a window, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any

import torch
from torch import Tensor

from secateur.criteria.fitness import Fitness, FullKL
from secateur.engine.keeping import Keeper
from secateur.models.sources import Source
from secateur.observe.calibration import evaluating
from secateur.plans import pack_bits, unpack_bits
from secateur.structure import Matrix

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

    ``fitness`` compares predictions with those of the dense model. What is finished is noted in ``keeper``.
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
    ) -> None:
        self._model = source.whole(dtype)
        self._matrices, self._ids, self._keeper = matrices, ids.to(source.device), keeper
        self._generations, self._progress = generations, progress
        self._fitness = fitness or FullKL()
        each = self._fitness.kept_bytes(ids.shape[1], self._model.config.get_text_config().vocab_size)
        self._most = _REMEMBERED_BYTES // max(each, 1)
        self._dense = {m.module: self._weight(m).clone() for m in matrices}
        self._at: dict[str, int] = {}
        self._remembered: dict[tuple[int, int], Any] = {}
        self._found: dict[tuple[Any, ...], float] = {}

    def fitness(self, levels: tuple[int, ...], tokens: int, seed: int) -> float:
        """See ``Trials``: mean over predictions; the last one of a window, which nothing follows, is left out."""
        windows = self._windows(tokens, seed)
        key = (levels, tuple(windows))
        if key not in self._found:
            self._remember(windows)
            self._set(levels)
            found = [(self._one(*window) * (window[1] - 1), window[1] - 1) for window in windows]
            self._found[key] = sum(total for total, _ in found) / sum(count for _, count in found)
        return self._found[key]

    def done(self) -> list[tuple[int, ...]]:
        """See ``Trials``."""
        noted = self._keeper.noted(_GENERATION)
        return [tuple(noted[generation]) for generation in sorted(noted)]

    def finish(self, generation: int, parent: tuple[int, ...]) -> None:
        """See ``Trials``."""
        self._keeper.note(_GENERATION, generation, list(parent))
        # other candidates are measured from now on
        self._found.clear()
        self._progress("search", generation + 1, self._generations)

    def _windows(self, tokens: int, seed: int) -> list[tuple[int, int]]:
        """Which windows are read, and how many tokens of each: whole ones, and of the last what is left."""
        length = min(tokens, self._ids.shape[1])
        count = min(-(-tokens // length), len(self._ids))
        chosen = sorted(Random(seed).sample(range(len(self._ids)), count))
        lengths = [min(length, tokens - i * length) for i in range(count)]
        # a single token predicts nothing
        return [one for one in zip(chosen, lengths, strict=True) if one[1] > 1]

    @torch.no_grad()
    def _remember(self, windows: Sequence[tuple[int, int]]) -> None:
        """What the fitness needs of the dense model's predictions for these windows."""
        missing = [window for window in windows if window not in self._remembered]
        if not missing:
            return
        if len(self._remembered) >= self._most:
            self._remembered = {w: kept for w, kept in self._remembered.items() if w in windows}
        for window in missing:
            self._remembered[window] = self._fitness.remember(lambda window=window: self._dense_logits(window))

    def _dense_logits(self, window: tuple[int, int]) -> Tensor:
        self._set(None)
        return self._logits(*window)

    def _one(self, window: int, length: int) -> float:
        following_T = self._ids[window, 1:length]
        with torch.inference_mode():
            bad = self._fitness.of(self._remembered[window, length], self._logits(window, length), following_T)
        # a model that gives NaN is no candidate
        return bad if math.isfinite(bad) else math.inf

    @torch.inference_mode()
    def _logits(self, window: int, length: int) -> Tensor:
        with evaluating(self._model):
            ids = self._ids[window : window + 1, :length]
            return self._model(input_ids=ids, use_cache=False).logits[0, :-1].float()

    @torch.no_grad()
    def _set(self, levels: tuple[int, ...] | None) -> None:
        """Write the matrices whose level has changed; None is the dense model."""
        for i, matrix in enumerate(self._matrices):
            level = None if levels is None else levels[i]
            if self._at.get(matrix.module) == level:
                continue
            weight = self._dense[matrix.module]
            if level is not None:
                weight = level_weight(self._keeper, matrix.module, level, weight)[1]
                self._at[matrix.module] = level
            else:
                self._at.pop(matrix.module, None)
            self._weight(matrix).copy_(weight)

    def _weight(self, matrix: Matrix) -> Tensor:
        """The weight of a matrix in the model, [outputs, inputs]."""
        weight: Tensor = self._model.get_submodule(matrix.module).weight.detach()  # type: ignore[assignment]
        return weight.T if matrix.transposed else weight
