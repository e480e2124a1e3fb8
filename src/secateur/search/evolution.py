"""Evolution of levels: parts of a model, each at one of several levels, shift sparsity between each other.

One level is as much in every part of a kind, so that a part one level up and another one down keep the whole as it is.
Where it isn't, only levels of the same size are exchanged.

    offspring   the parent after n = min(r, r') shifts, r and r' drawn from 1..shifts
    a shift     a part that can goes one level denser, and one of the same kind that can goes one level sparser
    selection   all are measured on few tokens, and those that survive a stage on more; the parent joins them in the
                last stage, and the best of it is the next parent

Source: O. Sieberling et al., "EvoPress", 2024, arXiv:2410.14649; G. Li et al., "Tyr-the-Pruner", 2025,
arXiv:2503.09657.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Protocol

Levels = tuple[int, ...]
"""the level of every part"""
Size = Callable[[int, int], int]
"""(part, level) → what it loses there"""

FIXED = ("none", "last", "all")
TRIED_BYTES = 1 << 30
"""Of hidden states of all models that are tried together: so many windows go through at a time, but at least one."""


class Trials(Protocol):
    """What a search asks of whoever can put levels together."""

    def losses(self, candidates: Sequence[Levels], tokens: int, seed: int) -> list[float]:
        """How bad the model with these levels is, on so many tokens drawn from ``seed``; lower = better."""
        ...

    def done(self) -> list[Levels]:
        """The parents of the generations that an earlier, interrupted search has finished."""
        ...

    def finish(self, generation: int, parent: Levels) -> None:
        """Keep the parent that a generation has chosen."""
        ...


@dataclass(frozen=True, kw_only=True)
class Evolution:
    """``tokens`` of every stage, and the ``survivors`` of every stage but the last.

    ``fixed`` names the stages that always read the same tokens; others draw them anew in every generation. Offspring
    that are equal are drawn again, ``tries`` times as many of them in all.
    """

    generations: int
    offspring: int
    tokens: tuple[int, ...]
    survivors: tuple[int, ...]
    shifts: int
    tries: int = 1
    fixed: str = "none"
    seed: int = 0

    @property
    def trial_tokens(self) -> int:
        """Tokens that go through the whole model in all, at most."""
        return self.generations * sum(self._stages())

    @property
    def widest_trial(self) -> int:
        """Tokens of all models that are compared at once, at most."""
        return max(self._stages())

    def _stages(self) -> list[int]:
        """Tokens of all models of a stage, the parent among those of the last."""
        measured = [self.offspring, *self.survivors]
        measured[-1] += 1
        return [count * tokens for count, tokens in zip(measured, self.tokens, strict=True)]

    def run(
        self,
        start: Levels,
        ranges: Sequence[range],
        trials: Trials,
        kinds: Sequence[str] = (),
        size: Size | None = None,
    ) -> Levels:
        """The levels of the best parent, from ``start`` on.

        ``ranges`` are the levels that every part may take, and ``kinds`` says between which parts shifts are made; all
        are of one kind without. With ``size``, what all parts lose together stays as it is. A run that goes on behind
        ``trials.done()`` gives the same.
        """
        done = trials.done()
        parent = done[-1] if done else start
        for generation in range(len(done), self.generations):
            # of its own in every generation, so that it doesn't matter where a run was interrupted
            random = Random(self.seed * 1_000_003 + generation)
            parent = self._next(parent, self._offspring(parent, ranges, kinds, size, random), trials, random)
            trials.finish(generation, parent)
        return parent

    def _offspring(
        self, parent: Levels, ranges: Sequence[range], kinds: Sequence[str], size: Size | None, random: Random
    ) -> list[Levels]:
        found: set[Levels] = set()
        for _ in range(self.offspring * self.tries):
            found |= {shifted(parent, ranges, random, most=self.shifts, kinds=kinds, size=size)} - {parent}
            if len(found) == self.offspring:
                break
        return sorted(found)

    def _next(self, parent: Levels, candidates: list[Levels], trials: Trials, random: Random) -> Levels:
        if not candidates:
            return parent
        for stage, tokens in enumerate(self.tokens):
            last = stage + 1 == len(self.tokens)
            fixed = self.fixed == "all" or (last and self.fixed == "last")
            draw = self.seed if fixed else random.randrange(1 << 30)
            # the parent comes last, and stays only where nothing is better or equal
            candidates = [*candidates, parent] if last else candidates
            found = dict(zip(candidates, trials.losses(candidates, tokens, draw), strict=True))
            # sorted by no more than that: where two are equal, the one that was ahead stays so
            candidates = sorted(candidates, key=found.__getitem__)[: 1 if last else self.survivors[stage]]
        return candidates[0]


def shifted(
    parent: Levels,
    ranges: Sequence[range],
    random: Random,
    *,
    most: int = 3,
    kinds: Sequence[str] = (),
    size: Size | None = None,
) -> Levels:
    """The parent after a few shifts, ``most`` at most.

    Each makes one part a level denser and one of its kind, perhaps the same, a level sparser, by as much of ``size``.
    """
    levels = list(parent)
    for _ in range(min(random.randint(1, most), random.randint(1, most))):
        able = [i for i, level in enumerate(levels) if level - 1 in ranges[i]]
        if not able:
            break
        down = random.choice(able)
        levels[down] -= 1
        gained = _step(size, down, levels)
        alike = [i for i in range(len(levels)) if not kinds or kinds[i] == kinds[down]]
        # the one that went down can always come back
        ups = [i for i in alike if levels[i] + 1 in ranges[i] and _step(size, i, levels) == gained]
        levels[random.choice(ups)] += 1
    return tuple(levels)


def _step(size: Size | None, part: int, levels: Sequence[int]) -> int:
    """What one level more takes from a part."""
    return 1 if size is None else size(part, levels[part] + 1) - size(part, levels[part])
