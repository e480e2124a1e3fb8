"""What a block adds last to its hidden states, and what more of it would make the block give something else.

Where a norm stands behind it, that holds to first order, with the scale of every token as it is:

    norm(s) = gain * (s - mean) / spread        E asked of norm(s)   ->   spread * E / gain asked of s

with the mean only in a LayerNorm. The part of E along s can't be had, as a norm takes it away again, and of a channel
whose gain is far below that of most little is asked for. B sequences, T tokens, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# of the median gain; where gains are around it and above, nothing changes
_LEAST_GAIN = 0.1


@dataclass(frozen=True)
class Ending:
    """The ``module`` of a block whose output is added last, by its name within it, and what comes behind.

    ``norm`` is the norm that its output, or the sum, passes through, and ``factor`` what its output is multiplied by.
    """

    module: str
    norm: str = ""
    factor: float = 1.0


class EndingWatch:
    """Asks of the module what its block has lost, batch by batch, with what its norm reads."""

    def __init__(self, block: nn.Module, ending: Ending) -> None:
        self.module = ending.module
        self._factor = ending.factor
        self._norm = block.get_submodule(ending.norm) if ending.norm else None
        self._normed: Tensor | None = None

    def begin(self) -> list[Any]:
        """Handles of the hooks that were put on the block."""
        return [] if self._norm is None else [self._norm.register_forward_pre_hook(self._see)]

    def end_of_batch(self) -> None:
        """Forget what the norm read."""
        self._normed = None

    def _see(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        # the first forward of a batch is that of the network as it is now
        if self._normed is None:
            self._normed = args[0]

    def asked(self, lost_BTD: Tensor) -> Tensor:
        """What the module would have to give more for the block to give ``lost_BTD`` more."""
        if self._norm is not None and self._normed is not None:
            spread_BT1, gain_D = self._spread(self._normed).to(lost_BTD.dtype), self._gain(lost_BTD)
            floor = (_LEAST_GAIN * gain_D.abs().median()).square()
            lost_BTD = spread_BT1.reshape(*lost_BTD.shape[:-1], 1) * lost_BTD * (gain_D / (gain_D.square() + floor))
        return lost_BTD / self._factor

    def _spread(self, s: Tensor) -> Tensor:
        s = s if s.dtype == torch.float64 else s.float()
        centred = s - s.mean(dim=-1, keepdim=True) if isinstance(self._norm, nn.LayerNorm) else s
        return centred.square().mean(dim=-1, keepdim=True).sqrt()

    def _gain(self, like_BTD: Tensor) -> Tensor:
        # norms store it as it is, or one less: what they do to +-1, of mean 0 and spread 1, tells
        signs_D = torch.ones_like(like_BTD[0, 0])
        signs_D[1::2] = -1
        assert self._norm is not None
        # with a bias it is the odd part
        return signs_D * (self._norm(signs_D) - self._norm(-signs_D)) / 2
