"""BlockPruner: remove attentions and FFNs one by one, always the one without which perplexity is lowest.

    gone = {};   repeat:  u* = argmin over the sub-layers u that are left of  perplexity(model without gone and u)
                          gone <- gone + {u*}

A transformer block is two residual sub-layers, its attention and its FFN, and either can leave without the other. Every
step measures the model as it is by then, so what a step chooses depends on the steps before it, and the steps of a
small cut are the first ones of a larger one: the plan's note lists them with the perplexity after each. `parts` says
what may leave: `mix`, `attention` (mha in the official code) or `mlp`. Published is a perplexity on 256 texts (the
code's readme has 64), at most about a third of the sub-layers, and no training afterwards.

Source: L. Zhong et al., "BlockPruner: Fine-grained Pruning for Large Language Models", 2024, arXiv:2406.10594; official
code MrGGLS/BlockPruner. Differs from it: the number of sub-layers can follow from a sparsity, which is met as closely
as a step allows; candidates share the blocks before their first own gap; a block with nothing left leaves as a whole.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from secateur.errors import BudgetError
from secateur.methods import Descriptor, Gone, Sublayer, SublayerMethod, Trials, option, register


@register("blockpruner")
@dataclass(frozen=True, kw_only=True)
class BlockPruner(SublayerMethod):
    """Options of BlockPruner."""

    sublayers: int = option(0, "number of sub-layers to remove; 0 = by sparsity", unit="sub-layers", ge=0)
    parts: str = option("mix", "which sub-layers may leave", choices=("mix", "attention", "mlp"))
    tokens: int = option(0, "calibration tokens on which perplexity is measured; 0 = all", unit="tokens", ge=0)

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
        return self.sublayers / sublayers if self.sublayers else self.sparsity

    def tried_tokens(self, sublayers: int, tokens: int) -> int:
        steps = round(self.share(sublayers) * sublayers)
        # a candidate costs the blocks behind its gap, half of them on average
        return sum(sublayers - step for step in range(steps)) * min(self.tokens or tokens, tokens) // 2

    def tried_together(self, sublayers: int, tokens: int) -> list[tuple[int, int]]:
        return [(sublayers, min(self.tokens or tokens, tokens))]

    def search(self, sublayers: Sequence[Sublayer], trials: Trials) -> tuple[Gone, tuple[str, ...]]:
        pool = [s for s in sublayers if self.parts in ("mix", s.kind)]
        self._check(pool, sublayers)
        order, steps = trials.done(), self.sublayers or round(self.sparsity * len(sublayers))
        while not self._enough(sublayers, [gone for gone, _ in order]):
            gone = order[-1][0] if order else frozenset()
            candidates = [gone | {s.name} for s in pool if s.name not in gone]
            losses = trials.losses(candidates, fitness="perplexity", tokens=self.tokens)
            best = min(range(len(candidates)), key=losses.__getitem__)
            order.append((candidates[best], losses[best]))
            trials.finish(len(order) - 1, *order[-1], steps)
        taken = self._nearest(sublayers, [gone for gone, _ in order])
        return (order[taken - 1][0] if taken else frozenset()), _notes(order[:taken])

    def _check(self, pool: Sequence[Sublayer], sublayers: Sequence[Sublayer]) -> None:
        most = sum(s.params for s in pool) / max(sum(s.params for s in sublayers), 1)
        if self.sublayers >= max(len(pool), 1) or (not self.sublayers and self.sparsity >= most):
            asked = f"{self.sublayers} sub-layers" if self.sublayers else f"{self.sparsity:.1%} of the parameters"
            raise BudgetError(
                f"can't remove {asked}: parts={self.parts} leaves {len(pool)} sub-layers to choose from, with"
                f" {most:.1%} of the parameters, and at least one must stay"
            )

    def _enough(self, sublayers: Sequence[Sublayer], prefixes: Sequence[Gone]) -> bool:
        if self.sublayers:
            return len(prefixes) >= self.sublayers
        return self.sparsity == 0 or (bool(prefixes) and _share(sublayers, prefixes[-1]) >= self.sparsity)

    def _nearest(self, sublayers: Sequence[Sublayer], prefixes: Sequence[Gone]) -> int:
        """How many steps come nearest to what was asked for, the fewer of two that are equally near."""
        if self.sublayers:
            return self.sublayers
        shares = [0.0, *(_share(sublayers, gone) for gone in prefixes)]
        return min(range(len(shares)), key=lambda taken: abs(shares[taken] - self.sparsity))


def _share(sublayers: Sequence[Sublayer], gone: Gone) -> float:
    """The fraction of the parameters that is gone."""
    return sum(s.params for s in sublayers if s.name in gone) / sum(s.params for s in sublayers)


def _notes(order: Sequence[tuple[Gone, float]]) -> tuple[str, ...]:
    """Every step: what left, and the perplexity after it."""
    before: Gone = frozenset()
    parts = []
    for gone, loss in order:
        parts += [f"{name} ({loss:.4g})" for name in gone - before]
        before = gone
    return (f"removed in this order, with the perplexity after it: {', '.join(parts)}",) if parts else ()
