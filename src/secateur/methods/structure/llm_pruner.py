"""LLM-Pruner: remove the heads and neurons without which the loss changes least, by Taylor expansion of all they hold.

    s      of every weight w that leaves with a unit, g the gradient of the mean loss L of N windows, g_j of one window:
           param_first    w g                         (Element^1)
           param_second   w^2 F,  F = (1/N) sum_j g_j^2
           param_mix      w g - w^2 F / 2             (the expansion to second order, F for the Hessian's diagonal)
           vectorize      w g, of which sums are taken before absolute values (Vector)
    row    sum |s| over one channel of one projection; vectorize: |sum s|; baselines l1, l2: sum |w|^p
    unit   sum over its channels of (the rows of its projections put together by ``grouping``)
    neuron = rows of gate and up and a column of down; head = rows of q, k, v and columns of o, with GQA those of all
    queries of a key-value head; channel of the hidden states = its entries in all matrices and norms, and in the tables

Layers in a window lose the same share, those around it nothing: published are layers 4 to 29 of 32, here the same
fractions of the depth. A share of a quarter there is a fifth of all parameters. `granularity=layer` keeps the first
blocks, and `channel` makes the hidden states narrower, so that every matrix loses the share. Biases have no part in
the score of a head or a neuron. Published are 10 windows of 64 tokens, and LoRA afterwards (`--heal lora`).

One block at a time has gradients: they come back through the blocks, so that no more than the activations that enter
every block is in memory, or on disk. With `rounds` the model is scored again after each part of what leaves.

Source: X. Ma, G. Fang and X. Wang, "LLM-Pruner: On the Structural Pruning of Large Language Models", NeurIPS 2023,
arXiv:2305.11627; official code horseee/LLM-Pruner. Differs from the official code: the budget is met exactly, by
neurons, where whole heads leave something over (`fill=false`: its counts); key-value heads collect the scores of their
own query heads (`fold=official`: every H/K-th); rounds start from fresh gradients; with `scope=global` a unit costs its
parameters (`fill=false`: units are counted). `second` is what reads the units, the paper's last executing structure.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.allocate import (
    Allocator,
    CountedAllocator,
    GlobalAllocator,
    RankedAllocator,
    UniformAllocator,
    WidthAllocator,
    Window,
    WindowAllocator,
)
from secateur.criteria import random_scores
from secateur.criteria.projections import EXPANSIONS, GROUPINGS, grouped, summed_rows
from secateur.errors import OptionError
from secateur.methods import Coupled, CoupledMethod, Descriptor, Part, option, register
from secateur.structure import HIDDEN, Anatomy

_POWERS = {"l1": 1, "l2": 2}
_OF_BLOCKS = ("parts", "scope", "first", "last", "first_mlp", "last_mlp", "fold", "fill")
"""Options that say something of heads and neurons alone."""

_WITHIN: dict[tuple[str, bool], Callable[[float], Allocator]] = {
    ("local", True): UniformAllocator,
    ("local", False): CountedAllocator,
    ("global", True): GlobalAllocator,
    ("global", False): RankedAllocator,
}


def _window(first: int, last: int) -> Window:
    """The layers that are cut; of 32 the published ones are 4 to 29."""
    return Window(
        lambda layers: round(layers / 8) if first < 0 else first,
        lambda layers: round(layers / 16) if last < 0 else last,
    )


@register("llm_pruner")
@dataclass(frozen=True, kw_only=True)
class LLMPruner(CoupledMethod):
    """Options of LLM-Pruner; defaults from the published run of 7 billion parameters."""

    criterion: str = option("param_first", "what a unit is scored by", choices=(*EXPANSIONS, *_POWERS, "random"))
    grouping: str = option(
        "auto",
        "how the projections of a unit are put together; first: k or gate alone, second: o or down; auto: sum, for l1"
        " and l2 mean",
        choices=("auto", *GROUPINGS),
    )
    granularity: str = option(
        "block",
        "what leaves: heads and neurons, the last blocks, or hidden channels",
        choices=("block", "layer", "channel"),
    )
    ratio: float = option(0.0, "share of every layer in the window; 0: as the sparsity says", ge=0, lt=1)
    scope: str = option(
        "local", "every layer of the window loses the same share, or all units are ranked", choices=("local", "global")
    )
    first: int = option(-1, "first layers whose heads stay; -1: an eighth of all", unit="layers", ge=-1)
    last: int = option(-1, "last layers whose heads stay; -1: a sixteenth of all", unit="layers", ge=-1)
    first_mlp: int = option(-1, "first layers whose neurons stay; -1: as first", unit="layers", ge=-1)
    last_mlp: int = option(-1, "last layers whose neurons stay; -1: as last", unit="layers", ge=-1)
    rounds: int = option(1, "iterative steps, after each of which all is scored again on other windows", ge=1)
    fold: str = option(
        "grouped",
        "query heads whose scores a key-value head gets: its own, or (official) every one that many apart",
        choices=("grouped", "official"),
    )
    fill: bool = option(True, "meet the budget exactly by taking what coarse heads leave over from the neurons")
    seed: int = option(0, "seed of random scores", ge=0)

    asking: ClassVar = (
        *CoupledMethod.asking, "ratio", "scope", "first", "last", "first_mlp", "last_mlp", "fill", "heal", "target",
    )  # fmt: skip
    descriptor: ClassVar = Descriptor(
        object="heads_and_neurons",
        granularity="structured_group",
        score="gradient",
        allocation="uniform",
        data="unlabelled_calibration",
        speedup="real",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rounds > 1 and self.programmed:
            raise OptionError("llm_pruner: rounds need a budget of params, macs or bytes, without uniform")
        if self.granularity != "block" and (self.programmed or self.heal != "none" or self.rounds > 1):
            raise OptionError(
                f"llm_pruner: granularity={self.granularity} goes with neither heal, rounds, uniform nor such budgets"
            )
        unread = [
            f.name for f in dataclasses.fields(self) if f.name in _OF_BLOCKS and getattr(self, f.name) != f.default
        ]
        if self.granularity != "block" and unread:
            raise OptionError(f"llm_pruner: granularity={self.granularity} doesn't go with {', '.join(unread)}")
        if self.ratio and self.granularity == "layer":
            raise OptionError("llm_pruner: granularity=layer takes whole layers: give a sparsity in place of ratio")
        if self.ratio and self.programmed:
            raise OptionError("llm_pruner: ratio and a budget both say how much stays: give one of them")

    @property
    def idle(self) -> bool:
        return not self.ratio and super().idle

    @property
    def kinds(self) -> tuple[str, ...]:
        return {"layer": ("layer",), "channel": (HIDDEN,)}.get(self.granularity, super().kinds)

    @property
    def narrows(self) -> bool:
        return self.granularity == "channel"

    @property
    def draws(self) -> bool:
        return self.criterion == "random" and self.granularity != "layer"

    @property
    def needs(self) -> tuple[str, ...]:
        return EXPANSIONS[self.criterion][0] if self.criterion in EXPANSIONS and self.granularity != "layer" else ()

    def partway(self, fraction: float) -> CoupledMethod:
        return dataclasses.replace(self, sparsity=self.sparsity * fraction, ratio=self.ratio * fraction)

    def allocator(self) -> Allocator:
        if self.granularity == "layer":
            return GlobalAllocator(self.sparsity)
        if self.granularity == "channel":
            return WidthAllocator(self.ratio or self.sparsity, 0 if self.round_to == 1 else self.round_to)
        heads = _window(self.first, self.last)
        neurons = _window(
            self.first if self.first_mlp < 0 else self.first_mlp, self.last if self.last_mlp < 0 else self.last_mlp
        )
        within = _WITHIN[self.scope, self.fill]
        return WindowAllocator(self.sparsity, heads, neurons, within, self.ratio)

    def share(self, anatomy: Anatomy) -> float:
        allocator = self.allocator()
        if not self.ratio or not isinstance(allocator, WindowAllocator):
            return self.ratio or super().share(anatomy)
        return allocator.weights(anatomy.of_kind(*self.kinds)) / anatomy.blocks.params

    def score_coupled(self, group: Coupled) -> Tensor:
        if self.granularity == "layer":
            return -torch.arange(group.units, dtype=torch.float64)
        if self.criterion == "random":
            return random_scores(group.name, self.seed, (group.units,))
        parts = [part for part in group.parts if part.role != "bias"]
        # of q, k, v and o the first is k, where the official code begins
        first = 1 if self.grouping == "first" and len(parts) > 3 else 0
        return self.together([self.rows(part) for part in parts[first:]])

    def together(self, rows: Sequence[Tensor]) -> Tensor:
        auto = "mean" if self.criterion in _POWERS else "sum"
        grouping = auto if self.grouping == "auto" else self.grouping
        return grouped(rows, grouping, strided=self.fold == "official")

    def rows(self, part: Part) -> Tensor:
        if self.criterion == "random":
            return random_scores(f"{part.tensor}.{part.dim}", self.seed, (len(part.index), 1))
        rows = summed_rows(self._salience(part), part.dim, signed=self.criterion == "vectorize")
        return rows[part.index.to(rows.device)]

    def _salience(self, part: Part) -> Tensor:
        if self.criterion in _POWERS:
            return part.weight.abs().pow(_POWERS[self.criterion])
        needs, expansion = EXPANSIONS[self.criterion]
        return expansion(part.weight, *(getattr(part, name) for name in needs))
