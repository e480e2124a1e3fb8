"""Cutting a module by a plan: as itself, or as a graph where its own code can't follow."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.errors import PlanMismatchError, UnsupportedModelError, UsageError
from secateur.healing.starting import start_anew
from secateur.networks.compiled import plainly_named
from secateur.networks.example import Example
from secateur.networks.fitting import kept_entries
from secateur.networks.optimizers import check_optimizer, shrink_optimizer
from secateur.plans import Plan
from secateur.provenance import Fingerprint, Provenance
from secateur.rowmasks import whole
from secateur.structure.graphcut import cut_graph, zero_tensor
from secateur.structure.groups import TracedAnatomy, traced_anatomy
from secateur.structure.modulecut import Different, cut_module, shell
from secateur.structure.resize import Cut
from secateur.structure.trace import attribute, trace


def module_anatomy(module: nn.Module, example: Example, *, heads: str = "outer", ignore: Sequence[str] = ()) -> Any:
    """The groups of coupled channels of a module. Raises UsageError or UnsupportedModelError."""
    if not isinstance(example.args, tuple) or not isinstance(module, nn.Module):
        raise UsageError("example_inputs must be a tuple of what the module is called with")
    tensors = [leaf for leaf in example.leaves() if isinstance(leaf, Tensor)]
    if tensors and not any(t.numel() for t in tensors):
        raise UsageError("the example inputs hold no entries, as with an empty batch: give a batch of one or more")
    dynamic = example.dynamic_shapes(module)
    traced = trace(module, example.args, example.kwargs, dynamic_shapes=dynamic, free=example.free)
    return traced_anatomy(traced, heads=heads, ignore=ignore)


def module_fingerprint(module: nn.Module) -> Fingerprint:
    """Class, hash of all names and shapes, hash of all values; of a module that is sharded over ranks all call this."""
    weights = hashlib.sha256()
    for _, tensor in _named_tensors(module):
        if not tensor.is_meta:
            weights.update(whole(tensor).cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    name = type(module).__name__
    return Fingerprint(
        architecture=name, shapes=_hash_of_shapes(module), weights=weights.hexdigest(), num_layers=0, name=name
    )


def _hash_of_shapes(module: nn.Module) -> str:
    found = "".join(f"{name}:{list(tensor.shape)};" for name, tensor in _named_tensors(module))
    return hashlib.sha256(found.encode()).hexdigest()


def _named_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, t) for name, t in sorted(module.state_dict().items()) if isinstance(t, Tensor)]


@dataclass(frozen=True)
class CutModule:
    """A cut module; ``graph_because`` says why it is a ``GraphModule`` and not the user's own class."""

    module: nn.Module
    graph_because: str | None = None


def apply_to_module(
    plan: Plan,
    module: nn.Module,
    *,
    anatomy: TracedAnatomy | None = None,
    example: Example | None = None,
    inplace: bool = False,
    mask: bool = False,
    optimizer: Optimizer | None = None,
) -> CutModule:
    """Cut a module, or zero what would leave; an ``optimizer`` of a module that is cut in place follows it.

    Raises PlanMismatchError, UsageError or UnsupportedModelError.
    """
    provenance = plan.provenance[0]
    check_optimizer(optimizer, module, inplace and not mask)
    if _hash_of_shapes(module) != plan.model.shapes:
        raise PlanMismatchError(
            f"the plan was made for {plan.model.architecture} with parameters of other shapes than this module's"
        )
    if example is None:
        assert provenance.inputs is not None
        example = Example.of(provenance.inputs, module)
    options = provenance.options
    heads, ignore = options.get("heads", "outer"), tuple(options.get("ignore", ()))
    traced = module_anatomy(module, example, heads=heads, ignore=ignore) if anatomy is None else anatomy
    for name, units in plan.groups.items():
        if name not in traced or traced[name].units != units:
            raise PlanMismatchError(f"this module has no group {name} of {units} channels, which the plan speaks of")
    removed = traced.units_removed({name: plan.removed(name) for name in plan.keep})
    cut = Cut(traced.trace, removed, traced.units_grown(plan.keep))
    _check_values(plan, cut)
    if mask:
        masked = masked_module(cut, module if inplace else copied(module))
        _put_values(plan, masked, dense=True)
        return CutModule(masked)
    graph = cut_graph(cut)
    try:
        made = cut_module(cut, graph, example.args, dict(example.kwargs or {}))
    except Different as reason:
        if inplace:
            raise UnsupportedModelError(
                f"{type(module).__name__} can't be cut in place: {reason}; without inplace the result is a GraphModule"
            ) from None
        _started(graph, cut, provenance)
        _put_values(plan, graph)
        return CutModule(graph, str(reason))
    if not inplace:
        _own(made, module)
    _started(made, cut, provenance)
    if inplace:
        before = dict(module.named_parameters(remove_duplicate=False))
        _adopt(module, made)
        made = module
        if optimizer is not None:
            shrink_optimizer(optimizer, before, module, cut, anew=bool(provenance.initialised))
    _put_values(plan, made)
    return CutModule(made)


def apply_masks(plan: Plan, module: nn.Module, *, inplace: bool = False) -> nn.Module:
    """A module with zeros where the masks of a plan have them, by the names of its parameters.

    Raises PlanMismatchError when the plan was made for other shapes.
    """
    if _hash_of_shapes(plainly_named(module)) != plan.model.shapes:
        raise PlanMismatchError(
            f"the plan was made for {plan.model.architecture} with parameters of other shapes than this module's"
        )
    made = module if inplace else copied(module)
    named = plainly_named(made)
    with torch.no_grad():
        for name, mask in plan.masks.items():
            weight = named.get_parameter(name)
            weight.masked_fill_(~mask.to(weight.device), 0)
    return made


def _started(made: nn.Module, cut: Cut, provenance: Provenance) -> None:
    """Give the cut module new weights where the plan asks for them."""
    if provenance.initialised:
        changed = {name for name, value in cut.trace.parameters.items() if cut.touches(value)}
        start_anew(made, cut.trace.module, changed, provenance.initialised, provenance.seed)


def _check_values(plan: Plan, cut: Cut) -> None:
    """Values must be for what stays of a tensor of this module. Raises PlanMismatchError."""
    for name in plan.values:
        known = name in cut.trace.parameters and plan.mask_shapes[name] == cut.trace.parameters[name].shape
        if not known or not torch.equal(plan.masks[name], kept_entries(cut, name)):
            raise PlanMismatchError(f"the plan has values for entries of {name} that aren't those that stay")


def _put_values(plan: Plan, module: nn.Module, *, dense: bool = False) -> None:
    """Give what stays of a tensor the values that the plan has for it."""
    with torch.no_grad():
        for name, values in plan.values.items():
            tensor = attribute(module, name)
            values = values.to(tensor)
            if dense:
                tensor[plan.masks[name].to(tensor.device)] = values
            else:
                tensor.copy_(values.reshape(tensor.shape))


def copied(module: nn.Module) -> nn.Module:
    made = shell(module)
    _own(made, module)
    return made


def _own(made: nn.Module, module: nn.Module) -> None:
    """Give a copy tensors of its own where it shares them."""
    shared = {id(t) for t in (*module.parameters(), *module.buffers())}
    done: dict[int, Tensor] = {}
    for part in made.modules():
        for store in cast("tuple[dict[str, Any], ...]", (part._parameters, part._buffers)):
            for name, tensor in store.items():
                if tensor is None or id(tensor) not in shared:
                    continue
                if id(tensor) not in done:
                    copied = tensor.detach().clone()
                    is_parameter = isinstance(tensor, nn.Parameter)
                    done[id(tensor)] = nn.Parameter(copied, tensor.requires_grad) if is_parameter else copied
                store[name] = done[id(tensor)]


def _adopt(module: nn.Module, made: nn.Module) -> None:
    """Bring the caller's module to the state of its cut copy."""
    for mine, theirs in zip(module.modules(), made.modules(), strict=True):
        for name, value in theirs.__dict__.items():
            if name != "_modules":
                mine.__dict__[name] = value


def masked_module(cut: Cut, module: nn.Module) -> nn.Module:
    done: set[int] = set()
    with torch.no_grad():
        for name, value in cut.trace.parameters.items():
            try:
                tensor = attribute(module, name)
            except AttributeError:
                continue  # a constant that export made
            if isinstance(tensor, Tensor) and id(tensor) not in done and cut.touches(value):
                done.add(id(tensor))
                tensor.copy_(zero_tensor(cut, value, tensor))
    return module
