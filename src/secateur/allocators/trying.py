"""Allocators that try whole models out: every matrix is pruned at several levels, and levels are put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.allocators.base import Allocator, BlockWeights, Part, Wishes, with_sparsity
from secateur.errors import UsageError
from secateur.methods import WeightMethod
from secateur.observe import Statistic
from secateur.search import Levels, Trials


@dataclass(frozen=True, kw_only=True)
class Trying(Allocator):
    """Base class of such allocators; they look at the inputs that the method looks at, and take no patterns."""

    observes: ClassVar[str] = "inputs"
    measures: ClassVar[bool] = True
    tries: ClassVar[bool] = True

    def needed_statistics(self, method: WeightMethod) -> Mapping[str, type[Statistic]]:
        return method.needed_statistics()

    def check(self, method: WeightMethod) -> None:
        if method.pattern:
            raise UsageError(
                f"allocator {self.name} tries numbers of weights, and pattern {method.pattern} fixes them: take owl,"
                " which mixes patterns, or leave the pattern out"
            )

    def level_sparsities(self, parts: Sequence[Part], sparsity: float) -> list[dict[int, float]]:
        """The sparsity of every level that a part may take, in [0, 1), for every part."""
        raise NotImplementedError(f"{type(self).__name__} must define level_sparsities()")

    def run(self, parts: Sequence[Part], sparsity: float, trials: Trials) -> Levels:
        """The levels to take."""
        raise NotImplementedError(f"{type(self).__name__} must define run()")

    def at(self, parts: Sequence[Part], levels: Levels, sparsity: float) -> Wishes:
        """The sparsities of these levels, [parts]."""
        raise NotImplementedError(f"{type(self).__name__} must define at()")

    def sparsities(self, parts: Sequence[Part], measured: Sequence[Tensor], sparsity: float) -> Wishes:
        # where nothing has been tried yet
        return self.at(parts, (0,) * len(parts), sparsity)

    def prune_levels(
        self, block: BlockWeights, method: WeightMethod, parts: Sequence[Part]
    ) -> list[dict[int, tuple[Tensor, Tensor | None]]]:
        """(mask, new weight or None) of every level, for every matrix of a block; ``parts`` are those of all blocks."""
        places, levels = {p.module: i for i, p in enumerate(parts)}, self.level_sparsities(parts, method.sparsity)
        found = []
        for target in block.targets:
            part, seen, made = parts[places[target.name]], block.seen.get(target.name, {}), {}
            step = method.step(part.shape)
            for level, wished in levels[places[target.name]].items():
                count = min(round(wished * part.size / step), (part.size - 1) // step) * step
                keep, weight, _ = with_sparsity(method, part, max(count, 0) / part.size).prune(target, seen)
                made[level] = (keep, weight)
            found.append(made)
        return found
