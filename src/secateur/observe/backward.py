"""Walking a decoder back block by block: what the loss of calibration text tells about the weights of every block.

The gradient of a loss comes down through the blocks as hidden states go up: that of a block's output gives that of its
input, and of its weights on the way. So one block with its gradients is in memory, and what enters every block, which
goes to files when it is larger than the limit. B windows of a batch, T tokens, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from secateur.errors import NonFiniteError
from secateur.finite import all_finite
from secateur.observe.activations import Activations
from secateur.observe.driver import Blocks, BlockWalk
from secateur.observe.statistics import Accumulator
from secateur.pieces import cross_entropy

Change = Callable[[nn.Module, int], None]
"""(working copy of a block, its number) → None: what is done to every block before it runs, both ways."""

_REMEDY = "try --dtype float32, or look at the text and the weights"


class Slopes(Accumulator):
    """What the losses of windows tell about one parameter, in float32 and in its shape.

    ``total`` is the sum over windows of the gradient of the loss of each, ``squares`` that of its squares where they
    are taken, and ``windows`` how many there were. The loss of several windows is the mean of their losses.
    """

    def __init__(self) -> None:
        self.total = torch.zeros(())
        self.squares: Tensor | None = None
        self.windows = 0

    def update(self, gradient: Tensor, windows: int = 1, *, squared: bool = False) -> None:
        """``gradient`` is that of the sum of the losses of ``windows``; only that of one can be ``squared``."""
        if squared and windows != 1:
            raise ValueError("squares are those of the gradient of one window")
        taken = gradient.float()
        # never the caller's own tensor
        self.total = self.total + taken if self.windows == 0 else self.total.add_(taken)
        if squared:
            self.squares = taken.square() if self.squares is None else self.squares.addcmul_(taken, taken)
        self.windows += windows

    def merge(self, other: Slopes) -> None:
        """See ``Statistic``."""
        self.total = self.total + other.total
        if other.squares is not None:
            self.squares = other.squares.clone() if self.squares is None else self.squares + other.squares
        self.windows += other.windows

    @property
    def gradient(self) -> Tensor:
        """That of the mean loss of all windows."""
        return self.total / max(self.windows, 1)

    @property
    def diagonal(self) -> Tensor:
        """The mean over windows of the squared gradient of each: the empirical Fisher information of every entry."""
        assert self.squares is not None, "squares were not taken"
        return self.squares / max(self.windows, 1)


class _Known(torch.autograd.Function):
    """Stands for all blocks: gives what they gave, and hands what came back down through them on to what enters."""

    @staticmethod
    def forward(ctx: Any, entering: Tensor, leaving: Tensor, slope: Tensor) -> Tensor:
        ctx.slope = slope
        return leaving.to(entering)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return ctx.slope.to(gradients[0]), None, None


class BackwardWalk(BlockWalk):
    """Up through all blocks once, then back, block by block, with the mean loss of every window.

    ``change`` is done to the working copy of every block before it runs. With ``single`` the windows run one by one, so
    that gradients of each can be looked at. Takes what ``BlockWalk`` does. Raises NonFiniteError.
    """

    def __init__(
        self,
        source: Blocks,
        ids: Tensor,
        *,
        dtype: torch.dtype,
        batch_tokens: int,
        hidden: Activations,
        change: Change = lambda block, layer: None,
        single: bool = False,
    ) -> None:
        self._down: Activations | None = None
        super().__init__(source, ids, dtype=dtype, batch_tokens=1 if single else batch_tokens, hidden=hidden)
        self._change, self._single = change, single
        self._into: list[Activations] = []
        self._climb()
        self._down = self._begin_descent()

    @property
    def streams(self) -> list[Activations]:
        """What an interrupted walk back goes on from."""
        return super().streams if self._down is None else [self._down]

    def _climb(self) -> None:
        """Forward through all blocks; what enters each of them is kept."""
        layers = len(self._source.blocks)
        for layer in range(layers):
            kept = self.hidden.another(f"into-{layer:05d}", parts=layers)
            for batch in range(len(self.hidden)):
                kept.append(self.hidden[batch])
            self._into.append(kept)
            block = self.open(layer)
            self._change(block, layer)
            self.advance(block, layer)

    def _begin_descent(self) -> Activations:
        """The gradients of the losses at what the last block gives, window by window."""
        # made here, and not in inference mode: what runs below must be differentiable
        self._recorded = {
            size: [tree_map_only(Tensor, torch.clone, (call.args, call.kwargs)) for call in calls]
            for size, calls in self._calls.items()
        }
        head = self._source.shell(self._dtype, whole=True)
        down = self.hidden.another("down")
        for batch, ids in enumerate(self._batches):
            rows = zip(self.hidden[batch].split(1), ids.split(1), strict=True)
            down.append(torch.cat([self._of_window(head, x.clone(), one) for x, one in rows]))
        return down

    def _of_window(self, head: nn.Module, hidden_BTD: Tensor, ids_BT: Tensor) -> Tensor:
        with torch.enable_grad():
            logits = self.head_logits(head, ids_BT, hidden_BTD.requires_grad_())[0, :-1]
            loss = cross_entropy(logits, ids_BT[0, 1:].to(logits.device))
            value = float(loss.detach())
            if not math.isfinite(value):
                raise NonFiniteError(f"the loss of a calibration window is {value:g}: {_REMEDY}")
            return torch.autograd.grad(loss, hidden_BTD)[0].to(self._source.device)

    def descend(self, block: nn.Module, layer: int, names: Sequence[str]) -> Mapping[str, Slopes]:
        """The slopes of these parameters of a block, by their names within it.

        Blocks come in reverse order, each once; ``block`` is one that ``open_changed`` gave. Raises NonFiniteError.
        """
        assert self._down is not None
        parameters = [block.get_parameter(name) for name in names]
        block.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        slopes = {name: Slopes() for name in names}
        for batch in range(len(self._down)):
            entering, gradients = self._pull(block, layer, batch, self._down[batch], parameters)
            if not all_finite(entering):
                raise NonFiniteError(f"the gradient of the loss at layer {layer} is NaN or inf: {_REMEDY}")
            for slope, parameter, gradient in zip(slopes.values(), parameters, gradients, strict=True):
                # the loss need not depend on all
                found = torch.zeros_like(parameter) if gradient is None else gradient
                slope.update(found.detach(), len(entering), squared=self._single)
            self._down[batch] = entering
        self._down.turn()
        # nobody asks for what entered this block any more
        self._into[layer] = Activations()
        return slopes

    def outside(self, names: Sequence[str]) -> Mapping[str, Slopes]:
        """The slopes of these parameters around the blocks, by their names in the model, once all have been descended.

        A head that is tied to the embedding adds to the slopes of that. Raises NonFiniteError.
        """
        assert self._down is not None
        shell = self._source.shell(self._dtype, whole=True)
        shell.requires_grad_(False)
        held = {name: [shell.get_parameter(name)] for name in names}
        head: Any = shell.get_output_embeddings()  # type: ignore[operator]
        embedding: Any = shell.get_input_embeddings()  # type: ignore[operator]
        for parameters in held.values():
            # the shell has a tied head as a copy
            if parameters[0] is embedding.weight and all(head.weight is not one[0] for one in held.values()):
                parameters.append(head.weight)
            for parameter in parameters:
                parameter.requires_grad_(True)
        slopes = {name: Slopes() for name in names}
        for batch, ids in enumerate(self._batches):
            windows = zip(self.hidden[batch].split(1), self._down[batch].split(1), ids.split(1), strict=True)
            for leaving, entering, one in windows:
                gradients = self._around(shell, leaving.clone(), entering.clone(), one, list(chain(*held.values())))
                for name, parameters in held.items():
                    found = sum(gradients.pop(0).float() for _ in parameters)
                    slopes[name].update(found, 1, squared=self._single)  # type: ignore[arg-type]
        return slopes

    def _around(
        self, shell: nn.Module, leaving: Tensor, entering: Tensor, ids: Tensor, parameters: list[nn.Parameter]
    ) -> list[Tensor]:
        """The gradients of the loss of one window, the blocks being known by what leaves them and comes back down."""
        with torch.enable_grad():
            logits = self.head_logits(shell, ids, lambda x: _Known.apply(x, leaving, entering))[0, :-1]  # type: ignore[no-untyped-call]
            loss = cross_entropy(logits, ids[0, 1:].to(logits.device))
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
        # the loss need not depend on all
        return [torch.zeros_like(p) if g is None else g.detach() for p, g in zip(parameters, found, strict=True)]

    def open_changed(self, layer: int) -> nn.Module:
        """A working copy of a block as it ran on the way up."""
        block = self.open(layer)
        self._change(block, layer)
        return block

    def _pull(
        self, block: nn.Module, layer: int, batch: int, leaving: Tensor, parameters: Sequence[nn.Parameter]
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        """The gradients at the input of a block and at its parameters, from that at its output."""
        device = self._source.device_of(layer)
        args, kwargs = self._recorded[leaving.shape[0]][layer]
        with torch.enable_grad():
            hidden = self._into[layer][batch].to(device).clone().requires_grad_()
            output: Any = block(hidden, *args, **kwargs)
            output = output[0] if isinstance(output, tuple) else output
            found = torch.autograd.grad(output, [hidden, *parameters], leaving.to(device), allow_unused=True)
        assert found[0] is not None
        return found[0].to(self._source.device), found[1:]
