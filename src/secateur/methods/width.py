"""Methods that make the hidden states of decoders narrower, or their vocabulary smaller."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from torch import Tensor

from secateur.allocate import part_of
from secateur.errors import OptionError
from secateur.methods.base import Method
from secateur.methods.views import Seen, Target
from secateur.options import option
from secateur.structure.lexicon import Lexicon


@dataclass(frozen=True, kw_only=True)
class RotationMethod(Method):
    """Turns the hidden states behind every sub-layer to a basis of their own, and keeps its first directions."""

    sparsity: float = option(0.25, "fraction of the budget removed, by default of the hidden size", ge=0, lt=1)
    budget: str = option(
        "hidden",
        "what the sparsity is a fraction of: the hidden size, of which shortcuts give some back, or the blocks'"
        " parameters with these counted in",
        choices=("hidden", "params"),
    )
    round_to: int = option(8, "the directions that stay are a multiple of this, rounded down", unit="directions", ge=1)
    slice_head: bool = option(False, "let the head read fewer directions too, with the final norm's scale folded in")

    def width(self, size: int, left: Callable[[int], float]) -> int:
        """How many of ``size`` directions stay; ``left`` gives the fraction of the blocks' parameters at a width."""
        if self.budget == "hidden":
            return part_of(size, 1 - self.sparsity) // self.round_to * self.round_to
        widths = range(0, size + 1, self.round_to)
        # a width of nothing is no width; more of it is more that is left
        return widths[bisect_right(widths, 1 - self.sparsity, lo=1, key=left) - 1]

    def basis(self, gram: Tensor, width: int, number: int) -> Tensor:
        """A basis, [hidden, width] float64 with orthonormal columns, for hidden states with this ``gram`` matrix.

        ``gram`` is x^T x over all calibration tokens, [hidden, hidden] float64; ``number`` counts the bases of a model.
        """
        raise NotImplementedError(f"{type(self).__name__} must define basis()")


@dataclass(frozen=True, kw_only=True)
class HiddenMethod(Method):
    """Removes hidden channels: entries of the residual stream, in every matrix and norm at once.

    Statistics see what attentions and MLPs read, behind their norms.
    """

    sparsity: float = option(0.2, "fraction of the hidden channels removed", ge=0, lt=1)
    round_to: int = option(
        0,
        "the channels that stay are the nearest multiple of this; 0: of the query heads, as plain checkpoints of most"
        " families need",
        unit="channels",
        ge=0,
    )

    @property
    def narrows(self) -> bool:
        return True

    def score(self, target: Target, seen: Seen) -> Tensor:
        """Scores of all channels by one of the inputs, [hidden] float, higher = keep; their sum decides."""
        raise NotImplementedError(f"{type(self).__name__} must define score()")


@dataclass(frozen=True, kw_only=True)
class VocabularyMethod(Method):
    """Removes tokens: rows of the embedding and of the head, and with them what the tokenizer has of these tokens."""

    reaches_all: ClassVar[bool] = True

    sparsity: float = option(0.5, "fraction of the tokens of the vocabulary removed", ge=0, lt=1)
    min_count: int = option(
        0, "instead, remove the tokens that are read fewer times than this; 0 = by sparsity", unit="times", ge=0
    )
    round_to: int = option(1, "the number of tokens that stay is a multiple of this", unit="tokens", ge=1)
    protect: str = option("", "ids of tokens that stay whatever is read, such as 5,17,200-255")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.protected  # noqa: B018 (refused before any work)

    @property
    def uses_data(self) -> bool:
        return True

    @cached_property
    def protected(self) -> frozenset[int]:
        """The ids of ``protect``."""
        found: set[int] = set()
        for part in filter(None, (part.strip() for part in self.protect.split(","))):
            first, dash, last = part.partition("-")
            if not first.isdecimal() or (dash and not (last.isdecimal() and int(last) >= int(first))):
                raise OptionError(f"protect lists ids and ranges of ids, such as 5,17,200-255; got {part!r}")
            found |= set(range(int(first), int(last or first) + 1))
        return frozenset(found)

    def order(self, lexicon: Lexicon, counts: Sequence[int]) -> Iterator[tuple[int, int]]:
        """The tokens that may leave, in that order, each with how often it is read when its turn comes.

        ``counts`` are those of the calibration text, by id. ``lexicon.fixed`` must not be among them.
        """
        raise NotImplementedError(f"{type(self).__name__} must define order()")
