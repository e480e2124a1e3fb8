"""How good the predictions of a candidate are, beside those of the dense model: what searches over models make small.

A fitness looks at one window at a time, and remembers what it needs of the dense model's predictions, so that many
candidates are compared with them. T positions, V vocabulary, K entries of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor
from torch.nn import functional as F

from secateur.criteria.divergence import Divergence


class Fitness(Protocol):
    """Lower = better. Logits are [positions, vocabulary], ``following_T`` the tokens that really follow, int64.

    One that isn't ``beside_dense`` needs nothing of the dense model.
    """

    beside_dense: ClassVar[bool]

    def remember(self, dense: Callable[[], Tensor]) -> Any:
        """What is kept of a window; ``dense`` gives the dense model's logits."""
        ...

    def of(self, kept: Any, other_TV: Tensor, following_T: Tensor) -> float:
        """Mean over positions; ``kept`` is what was remembered of the same window."""
        ...

    def kept_bytes(self, positions: int, vocabulary: int) -> int:
        """How much is remembered of so many positions."""
        ...


@dataclass(frozen=True)
class FullKL:
    """KL(dense || other) over the whole vocabulary, in nats."""

    beside_dense: ClassVar[bool] = True

    def remember(self, dense: Callable[[], Tensor]) -> Divergence:
        return Divergence(dense())

    def of(self, kept: Divergence, other_TV: Tensor, following_T: Tensor) -> float:
        return kept.of(other_TV)

    def kept_bytes(self, positions: int, vocabulary: int) -> int:
        # logits and probabilities
        return 2 * 4 * positions * vocabulary


@dataclass(frozen=True)
class SparseKL:
    """The same over the ``top`` tokens to which the dense model gives most, both renormalised over these, in nats."""

    top: int
    beside_dense: ClassVar[bool] = True

    def remember(self, dense: Callable[[], Tensor]) -> tuple[Divergence, Tensor]:
        dense_TV = dense()
        values_TK, index_TK = dense_TV.topk(min(self.top, dense_TV.shape[-1]), dim=-1)
        return Divergence(values_TK), index_TK

    def of(self, kept: tuple[Divergence, Tensor], other_TV: Tensor, following_T: Tensor) -> float:
        divergence, index_TK = kept
        return divergence.of(other_TV.gather(-1, index_TK))

    def kept_bytes(self, positions: int, vocabulary: int) -> int:
        return (2 * 4 + 8) * positions * min(self.top, vocabulary)


@dataclass(frozen=True)
class CrossEntropy:
    """Cross-entropy of the token that follows, in nats: the logarithm of perplexity. The dense model has no part."""

    beside_dense: ClassVar[bool] = False

    def remember(self, dense: Callable[[], Tensor]) -> None:
        return None

    def of(self, kept: None, other_TV: Tensor, following_T: Tensor) -> float:
        return float(F.cross_entropy(other_TV.float(), following_T))

    def kept_bytes(self, positions: int, vocabulary: int) -> int:
        return 0
