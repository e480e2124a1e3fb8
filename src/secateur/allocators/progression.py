"""Progression: early blocks stay denser than late ones, in equal steps, and matrices of some kinds than others.

    s_l = S - beta * (L - 1) / 2 + beta * (l - 1),   l = 1..L              beta > 0: the first block is the densest

What the first blocks get wrong all later ones amplify. S is the sparsity that is asked for and the mean of all s_l,
weighted by the weights of the blocks. No data.

beta may be at most 2 * min(S, 1 - S) / (L - 1), so that every s_l lies in [0, 1]. `slope` gives it as a fraction of
that, which means the same at every depth and sparsity; `beta` gives it in absolute terms. With `beta=auto` slopes from
0 to 0.8 are tried out: each matrix is pruned for all of them, by the method, on the dense model, and the slope is taken
that leaves the predictions for some calibration text nearest to the dense model's (mean KL divergence per token).

Kinds: what `attention` adds follows what evolutionary searches have found (q and k sparser, v and o denser):

    s += attention * min(S, 1 - S) * kind,      kind = +1 for q and k, -1 for v and o, 0 for all others

after which all s are shifted together until S is met. With attention = 0 this is the published progression.

Source: "arithmetic progression" of arXiv:2502.14770 (beta by a grid of step 0.002, each value a full pruning run); the
signs of the kinds from the 70 % optima that IST-DASLab/EvoPress has published (arXiv:2410.14649).
Differs from the former: its beta is searched for every model and sparsity, by perplexity after full runs; the default
slope here is one number, the steepest that has been run on SmolLM2-135M at 70 % (benchmarks/allocation.py), and
beta=auto measures the divergence of matrices that were pruned apart.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from secateur.allocators.base import Allocator, Part, Wishes, sizes_of
from secateur.allocators.registry import allocator
from secateur.allocators.trying import Trying
from secateur.errors import BudgetError, OptionError
from secateur.methods import option
from secateur.search import Levels, Trials

# what beta=auto tries; at 70 % and 32 blocks this is the published grid
_SLOPES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
_KINDS = {"q": 1.0, "k": 1.0, "v": -1.0, "o": -1.0}


@allocator("progression")
@dataclass(frozen=True, kw_only=True)
class Progression(Allocator):
    """Options of the progression."""

    slope: float = option(
        0.4, "beta as a fraction of the largest possible one; negative: late blocks denser", ge=-1, le=1
    )
    beta: float | str | None = option(
        None, "increment from block to block, instead of slope; auto: tried out", unit="sparsity"
    )
    attention: float = option(
        0.2, "what q and k lose more, and v and o less, as a fraction of min(S, 1 - S)", ge=-1, le=1
    )

    shares: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.beta, str) and self.beta != "auto":
            try:
                beta = float(self.beta)
            except ValueError:
                raise OptionError(f"progression: beta must be a number or auto, got {self.beta!r}") from None
            object.__setattr__(self, "beta", beta)
            super().__post_init__()

    def working(self) -> Allocator:
        return SlopeSearch(progression=self) if self.beta == "auto" else self

    def sparsities(self, parts: Sequence[Part], measured: Sequence[Tensor], sparsity: float) -> Wishes:
        layers = np.array([part.layer for part in parts], dtype=np.float64)
        room, steps = min(sparsity, 1.0 - sparsity), float(layers.max())
        # a single block has no step
        most = 2 * room / steps if steps else 0.0
        beta = self.beta if isinstance(self.beta, float | int) else self.slope * most
        if steps and abs(beta) > most * (1 + 1e-9):
            raise BudgetError(
                f"allocator progression: beta {beta:g} would leave [0, 1]: with {int(steps) + 1} blocks at sparsity"
                f" {sparsity:g} it can be at most {most:.4g}"
            )
        kinds = np.array([_KINDS.get(part.role, 0.0) for part in parts])
        wished = sparsity + beta * (layers - steps / 2) + self.attention * room * kinds
        sizes = sizes_of(parts)
        found = wished + (sparsity - (sizes * wished).sum() / sizes.sum())
        if found.min() < -1e-9 or found.max() > 1 + 1e-9:
            raise BudgetError(
                f"allocator progression: sparsities from {found.min():.3f} to {found.max():.3f} at {sparsity:g} leave"
                " [0, 1]: lower slope (or beta) or attention"
            )
        return found.clip(0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class SlopeSearch(Trying):
    """The progression whose slope is tried out; level k of all matrices is the k-th slope."""

    progression: Progression
    tokens: int = 2048

    name: ClassVar[str] = "progression"

    def options(self) -> dict[str, Any]:
        return self.progression.options()

    @property
    def trial_tokens(self) -> int:
        return len(_SLOPES) * self.tokens

    @property
    def widest_trial(self) -> int:
        return self.trial_tokens

    def level_sparsities(self, parts: Sequence[Part], sparsity: float) -> list[dict[int, float]]:
        levels: list[dict[int, float]] = [{} for _ in parts]
        for k in range(len(_SLOPES)):
            # beside what attention adds not every slope leaves [0, 1]
            with suppress(BudgetError):
                for level, wished in zip(levels, self.at(parts, (k,) * len(parts), sparsity), strict=True):
                    level[k] = float(wished)
        return levels

    def run(self, parts: Sequence[Part], sparsity: float, trials: Trials) -> Levels:
        possible = [(k,) * len(parts) for k in self.level_sparsities(parts, sparsity)[0]]
        losses = trials.losses(possible, self.tokens, 0)
        return min(zip(possible, losses, strict=True), key=lambda one: one[1])[0]

    def at(self, parts: Sequence[Part], levels: Levels, sparsity: float) -> Wishes:
        chosen = replace(self.progression, beta=None, slope=_SLOPES[levels[0]])
        return chosen.sparsities(parts, [], sparsity)
