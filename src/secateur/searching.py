"""Trials of a search: the whole model with matrices at chosen levels, and how far it is from the dense one.

What a level makes of a matrix was kept when it was pruned. The model is in memory as a whole, once; only matrices whose
level has changed are written before a trial. B windows, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any

import torch
from torch import Tensor

from secateur.keeping import Keeper
from secateur.models.sources import Source
from secateur.observe.calibration import evaluating
from secateur.plans import pack_bits, unpack_bits
from secateur.structure import Matrix

Progress = Callable[[str, int, int], None]
_GENERATION = "generation"


def level_tensors(module: str, made: Mapping[int, tuple[Tensor, Tensor | None]]) -> dict[str, Tensor]:
    """What is kept of the levels of a matrix: packed masks, and new values, none where the old ones stay."""
    tensors = {}
    for level, (keep, weight) in made.items():
        tensors[f"{module}/{level}/mask"] = pack_bits(keep)
        tensors[f"{module}/{level}/values"] = torch.empty(0) if weight is None else weight[keep].float().cpu()
    return tensors


class LevelTrials:
    """Trials on ``ids`` [windows, tokens] int64, of matrices whose levels ``keeper`` has.

    What is finished is noted in ``keeper``.
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
    ) -> None:
        self._model = source.whole(dtype)
        self._matrices, self._ids, self._keeper = matrices, ids.to(source.device), keeper
        self._generations, self._progress = generations, progress
        self._dense = {m.module: self._weight(m).clone() for m in matrices}
        self._at: dict[str, int] = {}
        self._logits: dict[int, Tensor] = {}
        self._found: dict[tuple[Any, ...], float] = {}

    def divergence(self, levels: tuple[int, ...], tokens: int, seed: int) -> float:
        """See ``Trials``: mean over predictions of KL(dense || candidate) in nats."""
        windows, length = self._windows(tokens, seed)
        key = (levels, tuple(windows), length)
        if key not in self._found:
            missing = [window for window in windows if window not in self._logits]
            if missing:
                self._set(None)
                self._logits |= {window: self._log_softmax(window) for window in missing}
            self._set(levels)
            self._found[key] = sum(self._one(window, length) for window in windows) / len(windows)
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

    def _windows(self, tokens: int, seed: int) -> tuple[list[int], int]:
        """Which windows are read, and how much of each."""
        length = min(tokens, self._ids.shape[1])
        count = min(max(1, tokens // length), len(self._ids))
        return sorted(Random(seed).sample(range(len(self._ids)), count)), length

    def _one(self, window: int, length: int) -> float:
        with torch.inference_mode():
            dense_TV = self._logits[window][:length]
            found_TV = self._log_softmax(window, length)
            apart = float((dense_TV.exp() * (dense_TV - found_TV)).sum(dim=-1).double().mean())
            # a model that gives NaN is no candidate
            return apart if math.isfinite(apart) else math.inf

    @torch.inference_mode()
    def _log_softmax(self, window: int, length: int | None = None) -> Tensor:
        with evaluating(self._model):
            logits_TV = self._model(input_ids=self._ids[window : window + 1, :length], use_cache=False).logits[0]
        return logits_TV.float().log_softmax(dim=-1)

    @torch.no_grad()
    def _set(self, levels: tuple[int, ...] | None) -> None:
        """Write the matrices whose level has changed; None is the dense model."""
        for i, matrix in enumerate(self._matrices):
            level = None if levels is None else levels[i]
            if self._at.get(matrix.module) == level:
                continue
            weight = self._dense[matrix.module]
            if level is not None:
                keep = unpack_bits(self._keeper.ranked(f"{matrix.module}/{level}/mask"), tuple(weight.shape))
                keep = keep.to(weight.device)
                values = self._keeper.ranked(f"{matrix.module}/{level}/values")
                if values.numel():
                    weight = torch.zeros_like(weight).masked_scatter_(keep, values.to(weight.device, weight.dtype))
                else:
                    weight = weight * keep
                self._at[matrix.module] = level
            else:
                self._at.pop(matrix.module, None)
            self._weight(matrix).copy_(weight)

    def _weight(self, matrix: Matrix) -> Tensor:
        """The weight of a matrix in the model, [outputs, inputs]."""
        weight: Tensor = self._model.get_submodule(matrix.module).weight.detach()  # type: ignore[assignment]
        return weight.T if matrix.transposed else weight
