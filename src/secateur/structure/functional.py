"""In-place operators of an exported graph replaced by those that return a new tensor.

torch.export leaves ``x.add_(y)`` as it was written. Its own way to a functional graph traces everything a second time,
which takes longer than the export. Where the changed tensor has no views, as in nearly every network, renaming it does
the same.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

# they may return what they were given, though their schemas don't say so
_MAYBE_ALIAS = ("aten::dropout", "aten::alpha_dropout", "aten::feature_dropout", "aten::rrelu")


def make_functional(graph: fx.Graph) -> bool:
    """Rewrite ``graph`` in place; False, with the graph unusable, when it takes more than renaming."""
    order = {node: number for number, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if not isinstance(node.target, OpOverload) or not node.target._schema.is_mutable:
            continue
        changed, replacement = node.args[0] if node.args else None, _without_mutation(node.target)
        if replacement is None or not isinstance(changed, fx.Node) or not _stands_alone(changed):
            return False
        if not _same_type(node, changed):
            return False
        node.target = replacement
        changed.replace_all_uses_with(node, delete_user_cb=lambda user, here=node: order[user] > order[here])
    graph.lint()
    return True


def _without_mutation(target: OpOverload) -> OpOverload | None:
    """``aten.add.Tensor`` for ``aten.add_.Tensor``."""
    namespace, _, name = target._schema.name.partition("::")
    if not name.endswith("_") or name.startswith("_"):
        return None
    packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_"), None)
    found = getattr(packet, target._overloadname, None)
    return found if isinstance(found, OpOverload) and not found._schema.is_mutable else None


def _stands_alone(node: fx.Node) -> bool:
    """Whether no other tensor of the graph shares memory with this one."""
    return node.op == "call_function" and not _aliases(node) and not any(_aliases(user) for user in node.users)


def _aliases(node: fx.Node) -> bool:
    if node.target is operator.getitem:
        return True
    schema = getattr(node.target, "_schema", None)
    if schema is None or schema.name in _MAYBE_ALIAS:
        return node.op == "call_function"
    return any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)


def _same_type(node: fx.Node, changed: fx.Node) -> bool:
    """Whether the new operator gives the type of the tensor that was changed."""
    mine: Any = changed.meta.get("val")
    others = [n.meta.get("val") for n in node.all_input_nodes]
    return isinstance(mine, Tensor) and all(
        o.dtype in (mine.dtype, torch.bool) for o in others if isinstance(o, Tensor)
    )
