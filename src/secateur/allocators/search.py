"""Search: shift sparsity between matrices, and keep what leaves the model's predictions most as they were.

    level e of matrix k:  it loses base_k + e * unit weights,   e = -levels..levels, as far as that lies within it
    fitness             = mean over tokens of KL(dense model's next-token distribution || that of the candidate)

One level is the same number of weights in every matrix, so that a matrix one level up and another one down keep the
whole as it is. base is the arithmetic progression, with its defaults. All levels of all matrices are pruned beforehand,
by the method, on the dense model. An offspring is the parent after n = min(r, r') shifts, r and r' drawn from 1..3: a
matrix that can goes one level denser, and one that can goes one level sparser. The offspring are measured on
`first_tokens` tokens; the best `survivors` of them and the parent are measured on `last_tokens`, and the best of these
is the next parent.

Source: O. Sieberling et al., "EvoPress", 2024, arXiv:2410.14649; official code IST-DASLab/EvoPress. Differs from it:
starts at the progression (theirs: all matrices alike, where its published optima are much like a progression); a few
minutes on two cores instead of 400 generations of 64 offspring on up to 65,536 tokens; the parent is never lost to a
fresh draw of tokens, because the last stage always reads the same ones; equal offspring are measured once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from secateur.allocators.base import Part, Wishes, sizes_of
from secateur.allocators.progression import Progression
from secateur.allocators.registry import allocator
from secateur.allocators.trying import Trying
from secateur.methods import option
from secateur.search import Evolution, Levels, Trials


@allocator("search")
@dataclass(frozen=True, kw_only=True)
class Search(Trying):
    """Options of the level search; the numbers of tokens and offspring fit two cores and a small model."""

    levels: int = option(4, "levels to either side of the progression", ge=1)
    generations: int = option(12, "parents after the first", ge=0)
    offspring: int = option(8, "candidates per generation", ge=1)
    survivors: int = option(2, "candidates that reach the last stage", ge=1)
    first_tokens: int = option(512, "what all candidates are measured on", unit="tokens", ge=2)
    last_tokens: int = option(2048, "what the survivors and the parent are measured on", unit="tokens", ge=2)
    seed: int = option(0, "seed of shifts and of the tokens of the first stage", ge=0)

    def base(self, parts: Sequence[Part], sparsity: float) -> Wishes:
        """The sparsities at level 0, [parts]."""
        return Progression().sparsities(parts, [], sparsity)

    def unit(self, parts: Sequence[Part], sparsity: float) -> int:
        """How many weights one level is: half of what the narrowest square matrix has to give, over the levels."""
        side = min(max(part.shape) for part in parts)
        return max(1, int(0.5 * min(sparsity, 1 - sparsity) / self.levels * side**2))

    def ranges(self, parts: Sequence[Part], sparsity: float) -> list[range]:
        """The levels of every part that leave it some weights, and need none that it hasn't."""
        unit = self.unit(parts, sparsity)
        found = []
        for part, base in zip(parts, self.base(parts, sparsity) * sizes_of(parts), strict=True):
            low = min(int(base // unit), self.levels)
            high = min(int((part.size - 1 - base) // unit), self.levels)
            found.append(range(-low, max(high, 0) + 1))
        return found

    def at(self, parts: Sequence[Part], levels: Levels, sparsity: float) -> Wishes:
        """The sparsities of these levels, [parts]."""
        return self.base(parts, sparsity) + self.unit(parts, sparsity) * (1 / sizes_of(parts)) * levels

    def level_sparsities(self, parts: Sequence[Part], sparsity: float) -> list[dict[int, float]]:
        unit, bases = self.unit(parts, sparsity), self.base(parts, sparsity)
        ranges = self.ranges(parts, sparsity)
        return [
            {level: float(base) + level * unit / part.size for level in levels}
            for part, base, levels in zip(parts, bases, ranges, strict=True)
        ]

    def evolution(self) -> Evolution:
        """How the levels are searched."""
        return Evolution(
            generations=self.generations,
            offspring=self.offspring,
            tokens=(self.first_tokens, self.last_tokens),
            survivors=(self.survivors,),
            shifts=3,
            fixed="last",
            seed=self.seed,
        )

    @property
    def trial_tokens(self) -> int:
        return self.evolution().trial_tokens

    @property
    def widest_trial(self) -> int:
        return self.evolution().widest_trial

    def run(self, parts: Sequence[Part], sparsity: float, trials: Trials) -> Levels:
        """The levels of the best parent. A run that goes on behind ``trials.done()`` gives the same."""
        return self.evolution().run((0,) * len(parts), self.ranges(parts, sparsity), trials)
