"""Modules in which parts were compiled by themselves (``model.block = torch.compile(model.block)``), without that."""

from __future__ import annotations

import copy

from torch import nn


def uncompiled(module: nn.Module) -> nn.Module:
    """The module behind torch.compile."""
    while isinstance(inner := module._modules.get("_orig_mod"), nn.Module):
        module = inner
    return module


def plainly_named(module: nn.Module) -> nn.Module:
    """A module whose parameters have the names that they had before parts of it were compiled.

    It is the same one where nothing was. Otherwise it shares all parameters and buffers with it, and every module that
    isn't around a compiled one.
    """
    made: dict[int, nn.Module] = {}

    def opened(given: nn.Module) -> nn.Module:
        inner = uncompiled(given)
        if id(inner) not in made:
            made[id(inner)] = inner  # a module that holds itself ends here
            children = {n: None if part is None else opened(part) for n, part in inner._modules.items()}
            if any(child is not inner._modules[name] for name, child in children.items()):
                made[id(inner)] = around = copy.copy(inner)
                around.__dict__["_modules"] = children
        return made[id(inner)]

    return opened(module)
