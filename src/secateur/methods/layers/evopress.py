"""EvoPress depth: search the attentions and FFNs to remove by evolution, as many of one as of the other.

    state    = k attentions and k FFNs that are gone
    fitness  = mean over tokens of KL(dense model's next-token distribution || that of the candidate)
    mutation = n = min(r, r') swaps, r and r' drawn from 1..3: in one kind, a sub-layer comes back and another leaves

The best of `starts` random states is the first parent. Every generation makes `offspring` mutants of the parent and
measures them on `first_tokens` tokens, drawn anew; the best `survivors` of them and the parent are measured on
`last_tokens`, and the best of these is the next parent. There are k (L - k) / 1.5 generations for L blocks. The search
starts from chance rather than from scores, so it can find sets that no ranking of single blocks gives.

Source: O. Sieberling et al., "EvoPress", 2024, arXiv:2410.14649; official code IST-DASLab/EvoPress
(evo_drop_search.py), whose script has these defaults. Differs from it: the last stage always reads the same tokens, so
that the parent is never lost to a fresh draw and needs no second measurement; where there are fewer states than
asked for, all of them are taken; a block with nothing left leaves as a whole.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import ClassVar

from secateur.errors import BudgetError
from secateur.methods import Descriptor, Gone, Sublayer, SublayerMethod, Trials, option, register

Kinds = tuple[tuple[str, ...], ...]
"""Names of all attentions, names of all FFNs."""
_DRAWS = 20
"""Draws for every state that is wanted: a small model has few, and the last of them takes long to turn up."""


@register("evopress")
@dataclass(frozen=True, kw_only=True)
class EvoPress(SublayerMethod):
    """Options of the depth search."""

    sparsity: float = option(0.25, "fraction of the attentions and of the FFNs removed, rounded down", ge=0, lt=1)
    layers: int = option(0, "attentions to remove, and as many FFNs; 0 = by sparsity", unit="sub-layers", ge=0)
    starts: int = option(64, "random states that the search begins with", ge=1)
    generations: int = option(0, "parents after the first; 0 = k (L - k) / 1.5", ge=0)
    offspring: int = option(32, "mutants of a generation", ge=1)
    survivors: int = option(2, "mutants that reach the last stage", ge=1)
    first_tokens: int = option(2048, "what all states are measured on", unit="tokens", ge=2)
    last_tokens: int = option(32768, "what survivors and parent are measured on", unit="tokens", ge=2)
    seed: int = option(0, "seed of states and of the tokens of the first stage", ge=0)

    costly: ClassVar = True
    descriptor: ClassVar = Descriptor(
        object="sublayers",
        granularity="layer",
        score="loss",
        allocation="global",
        data="unlabelled_calibration",
        speedup="real",
    )

    def share(self, sublayers: int) -> float:
        return 2 * self.layers / sublayers if self.layers else self.sparsity

    def tried_tokens(self, sublayers: int, tokens: int) -> int:
        count = self.layers or int(self.sparsity * sublayers / 2)
        first, last = min(self.first_tokens, tokens), min(self.last_tokens, tokens)
        each = self.offspring * first + self.survivors * last
        return self.starts * first + self._generations(count, sublayers // 2) * each if count else 0

    def tried_together(self, sublayers: int, tokens: int) -> list[tuple[int, int]]:
        first, last = min(self.first_tokens, tokens), min(self.last_tokens, tokens)
        return [(max(self.starts, self.offspring), first), (self.survivors, last)]

    def search(self, sublayers: Sequence[Sublayer], trials: Trials) -> tuple[Gone, tuple[str, ...]]:
        kinds = tuple(tuple(s.name for s in sublayers if s.kind == kind) for kind in ("attention", "mlp"))
        fewest = min(map(len, kinds))
        count = self.layers or int(self.sparsity * fewest)
        if count == 0:
            none = f"{self.sparsity:g} of {fewest} attentions and as many FFNs is less than one of each, so none leaves"
            return frozenset(), (none,) if self.sparsity else ()
        if count >= fewest:
            raise BudgetError(f"can't remove {count} of {fewest} attentions or FFNs: at least one must stay")
        steps = self._generations(count, fewest) + 1
        done = trials.done()
        parent, loss = done[-1] if done else self._start(kinds, count, trials)
        if not done:
            trials.finish(0, parent, loss, steps)
        for step in range(max(len(done), 1), steps):
            parent, loss = self._next(kinds, parent, loss, step, trials)
            trials.finish(step, parent, loss, steps)
        return parent, (f"KL divergence from the dense model on calibration text: {loss:.4g} nats per token",)

    def _generations(self, count: int, blocks: int) -> int:
        return self.generations or int(count * (blocks - count) / 1.5)

    def _start(self, kinds: Kinds, count: int, trials: Trials) -> tuple[Gone, float]:
        random = Random(self.seed)
        states = _distinct(lambda: _drawn(kinds, count, random), self.starts)
        first = trials.losses(states, fitness="divergence", tokens=self.first_tokens, seed=random.randrange(1 << 30))
        best = states[min(range(len(states)), key=first.__getitem__)]
        return best, self._last([best], trials)[0]

    def _next(self, kinds: Kinds, parent: Gone, loss: float, step: int, trials: Trials) -> tuple[Gone, float]:
        # of its own in every generation, so that it doesn't matter where a run was interrupted
        random = Random(self.seed * 1_000_003 + step)
        mutants = _distinct(lambda: mutated(parent, kinds, random), self.offspring, but=parent)
        draw = random.randrange(1 << 30)
        first = trials.losses(mutants, fitness="divergence", tokens=self.first_tokens, seed=draw)
        ranked = sorted(range(len(mutants)), key=first.__getitem__)
        finalists = [mutants[i] for i in ranked[: self.survivors]]
        # the parent comes last, and stays only where nothing is better or equal
        losses = [*self._last(finalists, trials), loss]
        best = min(range(len(losses)), key=losses.__getitem__)
        return [*finalists, parent][best], losses[best]

    def _last(self, states: Sequence[Gone], trials: Trials) -> list[float]:
        return trials.losses(states, fitness="divergence", tokens=self.last_tokens) if states else []


def mutated(parent: Gone, kinds: Kinds, random: Random) -> Gone:
    """The parent after a few swaps, each within one kind."""
    gone = set(parent)
    for _ in range(min(random.randint(1, 3), random.randint(1, 3))):
        names = kinds[random.randint(0, 1)]
        leaves = random.choice([name for name in names if name not in gone])
        returns = random.choice([name for name in names if name in gone])
        gone = (gone | {leaves}) - {returns}
    return frozenset(gone)


def _drawn(kinds: Kinds, count: int, random: Random) -> Gone:
    return frozenset(name for names in kinds for name in random.sample(names, count))


def _distinct(draw: Callable[[], Gone], count: int, but: Gone | None = None) -> list[Gone]:
    """So many different states in the order in which they were drawn, or those that turn up where there are fewer."""
    found: dict[Gone, None] = {}
    for _ in range(_DRAWS * count):
        if len(found) == count:
            break
        state = draw()
        if state != but:
            found[state] = None
    return list(found)
