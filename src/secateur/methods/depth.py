"""Methods that remove whole blocks of decoders, or attentions and FFNs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.methods.base import Method
from secateur.methods.views import (
    Gone,
    Seen,
    Sublayer,
    Target,
    Trials,
)
from secateur.options import option


@dataclass(frozen=True, kw_only=True)
class LayerMethod(Method):
    """Removes whole decoder blocks. Statistics see (block input, block output)."""

    reaches_all: ClassVar[bool] = True

    sparsity: float = option(0.2, "fraction of the decoder blocks removed, rounded down", ge=0, lt=1)
    layers: int = option(0, "number of blocks to remove; 0 = by sparsity", unit="blocks", ge=0)

    def score(self, target: Target, seen: Seen) -> float:
        """Score of one block, higher = keep."""
        raise NotImplementedError(f"{type(self).__name__} must define score() or measured() and scores()")

    def measured(self, target: Target, seen: Seen) -> Tensor:
        """What is remembered of a block until all are seen, floating-point of any shape; by default its score."""
        return torch.tensor([self.score(target, seen)], dtype=torch.float64)

    def scores(self, measured: Sequence[Tensor], count: int) -> Tensor:
        """Score of every block, [blocks] float64, higher = keep, when ``count`` of them leave."""
        return torch.cat(list(measured))


@dataclass(frozen=True, kw_only=True)
class SublayerMethod(Method):
    """Removes attentions and MLPs of decoder blocks, by trying out what the model loses without them.

    The blocks go through memory one at a time. A block whose two sub-layers leave leaves as a whole.
    """

    reaches_all: ClassVar[bool] = True

    sparsity: float = option(0.2, "fraction of the parameters of the blocks removed", ge=0, lt=1)

    hidden_bytes: ClassVar[int] = 2**30
    """What the hidden states of all models that are tried out together may take."""

    @property
    def uses_data(self) -> bool:
        return True

    def share(self, sublayers: int) -> float:
        """The fraction of so many sub-layers that leaves, roughly; for estimates."""
        return self.sparsity

    def tried_tokens(self, sublayers: int, tokens: int) -> int:
        """Tokens that go through models, roughly, of ``tokens`` calibration tokens; for estimates."""
        raise NotImplementedError(f"{type(self).__name__} must define tried_tokens()")

    def tried_together(self, sublayers: int, tokens: int) -> list[tuple[int, int]]:
        """(models that are tried out together, tokens that each looks at) in every kind of step; for estimates."""
        raise NotImplementedError(f"{type(self).__name__} must define tried_together()")

    def search(self, sublayers: Sequence[Sublayer], trials: Trials) -> tuple[Gone, tuple[str, ...]]:
        """(what leaves, notes for the plan). Raises BudgetError.

        It goes on behind ``trials.done()``, as if it had never been interrupted.
        """
        raise NotImplementedError(f"{type(self).__name__} must define search()")
