"""What a batch tells about linear layers of a module: its loss, and gradients of single samples where asked for.

Only a layer's input and the gradient at its output are held, S * T * (I + O) numbers; gradients of all its weights
for every sample are never there at once. S samples, T rows of each (tokens), O outputs, I inputs, n chosen weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from secateur.errors import NonFiniteError, UnsupportedModelError
from secateur.finite import all_finite

Batch = tuple[Tensor, ...]
"""Tensors whose first dimension are the samples."""

Loss = Callable[[nn.Module, Batch], Tensor]
"""(module, batch) → the loss of every sample, [samples]; no sample's loss depends on another sample."""


@dataclass(frozen=True)
class Told:
    """``loss`` is the mean over the samples; ``parts`` are inputs [S, T, I] and gradients of each sample's loss at the
    layer's output, [S, T, O].
    """

    loss: float
    samples: int
    parts: tuple[tuple[Tensor, Tensor], ...]

    def mean(self) -> Tensor:
        """Gradient of the mean loss, [outputs, inputs]."""
        return torch.stack([dy.flatten(0, 1).T @ x.flatten(0, 1) for x, dy in self.parts]).sum(0) / self.samples

    def per_sample(self, rows_n: Tensor, columns_n: Tensor) -> Tensor:
        """Gradients of every sample's loss at the weights (row, column), [samples, n] float64."""
        found = [
            (dy_T[:, rows_n].double() * x_T[:, columns_n].double()).sum(dim=0)
            for x, dy in self.parts
            for x_T, dy_T in zip(x, dy, strict=True)
        ]
        return torch.stack(found)

    def input_norms(self) -> Tensor:
        """Norm of every input over all rows, [inputs] float32."""
        return torch.stack([x.float().flatten(0, 1).square().sum(dim=0) for x, _ in self.parts]).sum(0).sqrt()


def listen(
    module: nn.Module, layers: Sequence[nn.Module], batch: Batch, loss: Loss, *, samples_at_once: int
) -> list[Told]:
    """Run the batch, and its gradient back to every one of ``layers``. Raises NonFiniteError, UnsupportedModelError."""
    total = 0.0
    parts: list[list[tuple[Tensor, Tensor]]] = [[] for _ in layers]
    for part in _parts(batch, samples_at_once):
        losses, calls = _call(module, layers, part, loss)
        total += float(losses.double().sum())
        for mine, call in zip(parts, calls, strict=True):
            mine.append(call)
    return [Told(total / len(batch[0]), len(batch[0]), tuple(mine)) for mine in parts]


def _call(
    module: nn.Module, layers: Sequence[nn.Module], batch: Batch, loss: Loss
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    calls: list[list[tuple[Tensor, Tensor]]] = [[] for _ in layers]

    def listening(mine: list[tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            # what comes before the first of them needs no graph
            told = output if output.requires_grad else output.detach().requires_grad_()
            mine.append((args[0].detach(), told))
            # a copy, which the module may write into
            return told.clone()

        return hook

    with ExitStack() as stack:
        for layer, mine in zip(layers, calls, strict=True):
            stack.callback(layer.register_forward_hook(listening(mine)).remove)
        with torch.enable_grad():
            losses = loss(module, batch)
            if not all_finite(losses):
                raise NonFiniteError("the loss of a batch is NaN or inf: try --dtype float32 or check the weights")
            outputs = [output for mine in calls for _, output in mine]
            gradients = torch.autograd.grad(losses.sum(), outputs, allow_unused=True) if losses.requires_grad else ()
    samples = len(batch[0])
    # some models flatten windows into rows, which keep their order where all are there
    rows = {samples, samples * batch[0].shape[1]} if batch[0].dim() == 2 else {samples}
    for layer, mine in zip(layers, calls, strict=True):
        if len(mine) != 1 or len(mine[0][0]) not in rows:
            # experts, and layers that are used several times
            raise _unfit(layer, len(mine))
    if len(gradients) != len(layers):
        raise _unfit(layers[0], 1)
    found = []
    for layer, [(x, _)], dy in zip(layers, calls, gradients, strict=True):
        if dy is None:
            raise _unfit(layer, 1)
        found.append((x.reshape(samples, -1, x.shape[-1]), dy.reshape(samples, -1, dy.shape[-1])))
    return losses.detach(), found


def _unfit(layer: nn.Module, times: int) -> UnsupportedModelError:
    return UnsupportedModelError(
        "a mask can be searched where the loss depends on a layer that is called once with all samples,"
        f" a {type(layer).__name__} was called {times} times"
    )


def mean_loss(module: nn.Module, batch: Batch, loss: Loss, *, samples_at_once: int) -> float:
    """The mean over the samples of a batch."""
    with torch.no_grad():
        total = sum(float(loss(module, part).double().sum()) for part in _parts(batch, samples_at_once))
    return total / len(batch[0])


def mean_gradients(
    module: nn.Module, weights: Sequence[nn.Parameter], data: Batch, loss: Loss, *, samples_at_once: int
) -> list[Tensor]:
    """Gradient of the mean loss over all samples at every weight, shaped like it."""
    totals = [torch.zeros_like(weight) for weight in weights]
    for weight in weights:
        weight.requires_grad_(True)
    try:
        for part in _parts(data, samples_at_once):
            with torch.enable_grad():
                found = torch.autograd.grad(loss(module, part).sum(), weights, allow_unused=True)
            for total, gradient in zip(totals, found, strict=True):
                if gradient is not None:
                    total += gradient / len(data[0])
    finally:
        for weight in weights:
            weight.requires_grad_(False)
    return totals


def exact_hessian(
    module: nn.Module, weight: nn.Parameter, places: tuple[Tensor, Tensor], batch: Batch, loss: Loss
) -> Tensor:
    """Second derivatives of the mean loss at the entries ``places`` of a weight, [n, n] float64, row by row."""
    weight.requires_grad_(True)
    try:
        # fused attention has no second derivative
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            (gradient,) = torch.autograd.grad(loss(module, batch).mean(), weight, create_graph=True)
            rows = [_derivatives(entry, weight, places) for entry in gradient[places]]
    finally:
        weight.requires_grad_(False)
    H = torch.stack(rows).double()
    return (H + H.T) / 2


def _derivatives(entry: Tensor, weight: nn.Parameter, places: tuple[Tensor, Tensor]) -> Tensor:
    # where the loss is linear in a weight there is no graph left
    found = torch.autograd.grad(entry, weight, retain_graph=True, allow_unused=True)[0] if entry.requires_grad else None
    return (torch.zeros_like(weight) if found is None else found.detach())[places]


def _parts(batch: Batch, size: int) -> Iterator[Batch]:
    return zip(*(tensor.split(size) for tensor in batch), strict=True)
