"""Methods that remove coupled channels of any traced network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from secateur.allocate import CHANNEL_SCOPES
from secateur.allocate.asked import parse_budgets
from secateur.criteria.groups import NORMALIZERS, REDUCTIONS, reduce_slices
from secateur.errors import OptionError
from secateur.methods.base import Method
from secateur.methods.views import (
    Consumer,
    Coupled,
    Fitting,
    Part,
    Whole,
)
from secateur.options import option

CHANNEL_BUDGETS = ("params", "macs", "bytes", "channels", "latency")


@dataclass(frozen=True, kw_only=True)
class ChannelMethod(Method):
    """Removes coupled channels of any network, found by tracing it.

    ``importance`` scores single parameters; what is coupled is put together by ``reduction`` and brought to one
    scale by ``normalizer`` (SPA, arXiv:2403.18955, §4). ``needs`` names what it wants beside the weights:
    ``gradient``, ``curvature``, ``diagonal``, ``inputs``, what the weights that read the channels are applied to, or
    ``maps``, the channels as feature maps.
    With ``per_batch`` scores of single batches are averaged, without, gradients are.
    """

    sparsity: float = option(0.3, "fraction of the budget that is removed", ge=0, lt=1)
    budget: str = option("params", "what the sparsity is a fraction of", choices=CHANNEL_BUDGETS)
    scope: str = option(
        "global", "all channels are ranked together, or every group loses the same share", choices=CHANNEL_SCOPES
    )
    reduction: str = option(
        "sum", "how scores of coupled slices and their entries are put together", choices=tuple(REDUCTIONS)
    )
    normalizer: str = option("mean", "what the scores of a group are divided by", choices=tuple(NORMALIZERS))
    heads: str = option(
        "outer",
        "what leaves of attention: whole heads, the same lane of every head, or both",
        choices=("outer", "inner", "both"),
    )
    min_keep: int = option(1, "channels that every group keeps at least", unit="channels", ge=1)
    round_to: int = option(1, "kept channels are a multiple of this", unit="channels", ge=1)

    instead: ClassVar[str] = (
        "removes coupled channels of a traced module: call secateur.prune with example_inputs, or take a method for"
        " language models ('secateur methods' shows them all)"
    )
    needs: ClassVar[tuple[str, ...]] = ()
    per_batch: ClassVar[bool] = False
    only_modules: ClassVar[str] = ""
    """Why an ONNX model won't do, for methods that must run the network or build it anew."""

    @classmethod
    def budget_options(cls, budget: str) -> dict[str, Any]:
        """``latency=0.7``, what may stay of one budget, is a sparsity of it. Raises OptionError."""
        if "=" not in budget:
            return {"budget": budget}
        asked = parse_budgets(budget, 0.0, CHANNEL_BUDGETS)
        if len(asked) > 1:
            raise OptionError(f"channels leave for one budget, got {', '.join(asked)}: cut to the others afterwards")
        ((name, stays),) = asked.items()
        # 0.7 stays is 0.3 removed, and not 0.30000000000000004
        return {"budget": name, "sparsity": round(1 - stays, 12)}

    def needed(self) -> tuple[str, ...]:
        """What these options need of data; by default all that the class does."""
        return self.needs

    def schedule(self) -> tuple[float, ...]:
        """The sparsities that are reached one after the other; scores are taken anew before each."""
        return (self.sparsity,)

    def budgets(self, sparsity: float) -> Mapping[str, float]:
        """Budget → fraction of it that leaves at least; the first is met within a unit."""
        return {self.budget: sparsity}

    def initialisation(self) -> str:
        """How the cut layers start, see ``Provenance.initialised``; empty when they keep their weights."""
        return ""

    def importance(self, part: Part) -> Tensor | None:
        """Score of every entry of a parameter, shaped like it, higher = keep; None leaves the parameter out."""
        raise NotImplementedError(f"{type(self).__name__} must define importance(), score() or scores()")

    def reduced(self, group: Coupled, importance: Callable[[Part], Tensor | None]) -> Tensor | None:
        """Scores of entries put together for every unit of a group, [units] float64; None when there are none."""
        rows = []
        for part in group.parts:
            scores = importance(part)
            if scores is not None:
                rows.append(reduce_slices(scores, part.dim, part.index, self.reduction))
        return REDUCTIONS[self.reduction](torch.stack(rows, dim=1)) if rows else None

    def score(self, group: Coupled) -> Tensor | None:
        """Score of every unit of a group, [units] float64, higher = keep; None keeps the whole group."""
        return self.reduced(group, self.importance)

    def layer_densities(self, whole: Whole) -> NDArray[np.float64] | None:
        """The fraction of its weights that each of ``whole.layers`` should keep; None for methods that don't say."""
        return None

    def scores(self, whole: Whole) -> Mapping[str, Tensor | None]:
        """``score`` of every group by name, for methods that look at more than one group at a time.

        Scores of more units than a group has are those of copies, round by round: entry units + u is a second unit u.
        """
        return {group.name: self.score(group) for group in whole.groups}

    def fitting(self) -> Fitting | None:
        """How weights are fitted to inputs after the choice; None leaves them as they are."""
        return None

    def compensate(self, consumer: Consumer, gone: Tensor) -> tuple[Tensor, tuple[str, ...]]:
        """(new weight [outputs, columns] with zeros in ``gone``, notes for the plan); ``gone`` is bool [columns]."""
        raise NotImplementedError(f"{type(self).__name__} must define compensate() where it has a fitting()")

    def normalized(self, scores_U: Tensor) -> Tensor:
        """The scores of one group on the scale on which groups compete."""
        return NORMALIZERS[self.normalizer](scores_U)
