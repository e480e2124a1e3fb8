"""What a module is called with when it is traced."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten, treespec_dumps, treespec_loads

from secateur.errors import UsageError
from secateur.plans import ExampleInputs


@dataclass(frozen=True)
class Example:
    """What a module is called with when it is traced."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] | None = None

    def recorded(self) -> ExampleInputs:
        """Shapes and types, for the plan."""
        leaves, spec = tree_flatten((self.args, dict(self.kwargs or {})))
        return ExampleInputs(spec=treespec_dumps(spec), leaves=tuple(map(_described, leaves)))

    @classmethod
    def of(cls, inputs: ExampleInputs) -> Example:
        """Inputs of the same shapes and types; all zeros."""
        leaves = [
            torch.zeros(leaf["shape"], dtype=getattr(torch, leaf["dtype"])) if "shape" in leaf else leaf["value"]
            for leaf in inputs.leaves
        ]
        args, kwargs = tree_unflatten(leaves, treespec_loads(inputs.spec))
        return cls(tuple(args), kwargs)


def _described(leaf: Any) -> dict[str, Any]:
    if isinstance(leaf, Tensor):
        return {"shape": list(leaf.shape), "dtype": str(leaf.dtype).removeprefix("torch.")}
    if leaf is None or isinstance(leaf, bool | int | float | str):
        return {"value": leaf}
    raise UsageError(f"example inputs must be tensors and plain values, got {type(leaf).__name__}")
