"""Angular distance: remove the run of consecutive decoder blocks whose ends point the most alike.

    d(l, n) = (1/pi) * mean over texts of arccos(cos(x_l, x_{l+n}))      x_l enters block l, at the last token
    l*      = argmin over l of d(l, n);   blocks l* .. l*+n-1 leave

n blocks leave in one piece: deep models repeat themselves over many neighbouring blocks, and a piece has only one place
where inputs differ from what the next block was trained on. Of equal runs the first leaves. A block's score is the
smallest distance of a run that holds it.

Source: A. Gromov et al., "The Unreasonable Ineffectiveness of the Deeper Layers", 2024, arXiv:2403.17887 (no official
code). The published recipe trains with QLoRA afterwards; this is its choice of blocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.methods import Descriptor, LayerMethod, Seen, Target, register
from secateur.observe import LastTokens, angles


@register("angular")
@dataclass(frozen=True, kw_only=True)
class Angular(LayerMethod):
    """Options of the angular distance."""

    statistics: ClassVar = {"ends": LastTokens}
    descriptor: ClassVar = Descriptor(
        object="layers",
        granularity="layer",
        score="similarity",
        allocation="global",
        data="unlabelled_calibration",
        speedup="real",
    )

    def measured(self, target: Target, seen: Seen) -> Tensor:
        return seen["ends"].rows_NC

    def scores(self, measured: Sequence[Tensor], count: int) -> Tensor:
        starts, ends = zip(*(rows_NC.chunk(2, dim=-1) for rows_NC in measured), strict=True)
        runs = range(len(measured) - count + 1)
        distances = torch.stack([angles(starts[run], ends[run + count - 1]).mean() for run in runs])
        blocks = range(len(measured))
        return torch.stack([distances[max(0, b - count + 1) : min(b, runs[-1]) + 1].min() for b in blocks])
