"""What a loss tells about parameters: its gradient, and products of its Hessian."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from secateur.errors import DataError, NonFiniteError, SecateurError, first_line
from secateur.finite import all_finite

Loss = Callable[[nn.Module, Any], Tensor]
"""(module, batch) → the mean loss of the batch, a scalar."""

Learned = dict[str, dict[str, Tensor]]
"""``gradient``, ``curvature`` or ``diagonal`` → parameter name → tensor shaped like the parameter."""


def cross_entropy(module: nn.Module, batch: Any, temperature: float = 1.0) -> Tensor:
    """The loss of a classifier on a batch (inputs, class indices), its logits divided by ``temperature``."""
    if not isinstance(batch, Sequence) or len(batch) != 2:
        raise DataError("batches must be pairs (inputs, class indices); give loss= for batches of another form")
    inputs, labels = batch
    logits = module(inputs)
    return F.cross_entropy(logits if temperature == 1.0 else logits / temperature, labels)


def learned(
    module: nn.Module, data: Any, loss: Loss, needs: Sequence[str], per_batch: bool, *, probes: int = 1, seed: int = 0
) -> list[Learned]:
    """What every batch tells, or all of them together: gradients are then the mean over batches.

    ``curvature`` is H g. ``diagonal`` estimates that of H by ``probes`` products with random signs, drawn from
    ``seed``: mean of z * (H z) (Hutchinson 1989; Bekas et al. 2007, eq. 5), which is exact for a diagonal H.
    The module is in evaluation mode and its ``.grad`` aren't touched; frozen parameters are told of like others.
    Raises DataError without data, NonFiniteError.
    """
    # removing a frozen channel changes the loss too
    parameters = {n: p for n, p in module.named_parameters() if p.is_floating_point() or p.is_complex()}
    found: list[Learned] = []
    count = 0
    signs = torch.Generator().manual_seed(seed)
    for batch in batches(data):
        # fused attention has no second derivative
        with _unfrozen(parameters), sdpa_kernel(SDPBackend.MATH) if _SECOND & set(needs) else nullcontext():
            value = _taken(loss, module, batch, count)
            one = _of_batch(value, parameters, needs, probes, signs)
        count += 1
        if per_batch or count == 1:
            found.append(one)
            continue
        for kind, tensors in one.items():
            for name, tensor in tensors.items():
                found[0][kind][name] += tensor
    if not found:
        raise DataError("the data that was given is empty, and this method needs some")
    for one in found:
        for kind, tensors in one.items():
            for name, tensor in tensors.items():
                tensor /= 1 if per_batch else count
                if not all_finite(tensor):
                    raise NonFiniteError(f"the {kind} of {name} holds NaN or inf: look at the data and the loss")
    return [{kind: _under_all_names(module, tensors) for kind, tensors in one.items()} for one in found]


@contextmanager
def _unfrozen(parameters: Mapping[str, Tensor]) -> Iterator[None]:
    """Gradients reach all parameters within the block, and those that they did before behind it."""
    frozen = [p for p in parameters.values() if not p.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _under_all_names(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A tied parameter has several names, and a graph need not call it by the first."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    by_id = {id(parameters[name]): tensor for name, tensor in tensors.items()}
    return {name: by_id[id(parameter)] for name, parameter in parameters.items() if id(parameter) in by_id}


def _taken(loss: Loss, module: nn.Module, batch: Any, number: int) -> Tensor:
    """The loss of a batch. Raises DataError where it fails: data, network and loss are the user's."""
    try:
        value = loss(module, batch)
    except SecateurError:
        raise
    except Exception as error:
        raise DataError(f"the loss of batch {number} of the data can't be taken: {first_line(error)}") from error
    if not isinstance(value, Tensor) or value.dim() != 0:
        raise DataError("loss(module, batch) must return a scalar tensor")
    if not value.requires_grad:
        raise DataError("loss(module, batch) must depend on the parameters: what it returned has no gradient")
    return value


def _of_batch(
    value: Tensor, parameters: Mapping[str, Tensor], needs: Sequence[str], probes: int, signs: torch.Generator
) -> Learned:
    curved = bool(_SECOND & set(needs))
    gradients = torch.autograd.grad(value, list(parameters.values()), create_graph=curved, allow_unused=True)
    found = {"gradient": _named(parameters, gradients)}
    # constant where the loss is linear in a parameter: that has no second derivative
    used = {n: g for n, g in zip(parameters, gradients, strict=True) if g is not None and g.requires_grad}

    def product(vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The Hessian times one vector per parameter."""
        inner = [(vectors[name] * g).sum() for name, g in used.items()]
        rows = torch.autograd.grad(inner, list(parameters.values()), allow_unused=True, retain_graph=True)
        return _named(parameters, rows)

    if "curvature" in needs:
        found["curvature"] = product(found["gradient"]) if used else _named(parameters, [None] * len(parameters))
    if "diagonal" in needs:
        total = {name: torch.zeros_like(p) for name, p in parameters.items()}
        for _ in range(probes if used else 0):
            z = {n: _random_signs(p, signs) for n, p in parameters.items()}
            for name, row in product(z).items():
                total[name] += z[name] * row / probes
        found["diagonal"] = total
    return {kind: tensors for kind, tensors in found.items() if kind in needs}


_SECOND = {"curvature", "diagonal"}


def _random_signs(like: Tensor, generator: torch.Generator) -> Tensor:
    # drawn on the CPU, so that every device sees the same ones
    drawn = torch.randint(0, 2, like.shape, generator=generator)
    return (2 * drawn - 1).to(like.device, like.dtype)


def _named(parameters: Mapping[str, Tensor], tensors: Iterable[Tensor | None]) -> dict[str, Tensor]:
    """A parameter that the loss doesn't depend on has a gradient of zero."""
    return {
        name: torch.zeros_like(p) if tensor is None else tensor.detach().clone()
        for (name, p), tensor in zip(parameters.items(), tensors, strict=True)
    }


def batches(data: Any) -> Iterator[Any]:
    """The batches of whatever holds some: a loader, a list, or one batch (a tuple of tensors)."""
    if isinstance(data, Tensor) or (isinstance(data, tuple) and data and isinstance(data[0], Tensor)):
        yield data
        return
    yield from data
