"""Cutting the user's own module: new tensors, new sizes, and the integers that its forward reads; then the proof.

Sizes like ``num_heads`` are plain attributes of Python objects. Those that the traced code reads are found by their
role: an attribute of the module that made a call whose size changes from a to b, and whose value is a, becomes b. That
is a guess, so the edited module is exported again and its graph must equal the cut graph, call by call. Where it
doesn't, the caller gets the cut graph instead and is told which line differs. What the proof doesn't need goes back to
its old value, unless its name is that of a width: numbers may be the same by chance, and be read in training only.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from secateur.errors import SecateurError
from secateur.structure.exporting import export, of_torch
from secateur.structure.graphcut import cut_tensor
from secateur.structure.resize import RESIZERS, Cut, named_arguments, resized
from secateur.structure.trace import Value, attribute, describe, has_rule, hint, module_of, sizes

# the shape of the output says everything that these arguments say
_BY_SHAPE = ("view", "reshape", "_unsafe_view", "expand", "split", "split_with_sizes", "unsafe_split", "repeat")
_BY_SHAPE += ("zeros", "ones", "new_zeros", "new_ones", "empty", "new_empty")
_SPLITS = ("aten::split_with_sizes", "aten::unsafe_split", "aten::chunk", "aten::unsafe_chunk", "aten::tensor_split")
"""What a cut writes as a split by sizes; the shapes of the parts say the rest."""
_SIZE_NAMES = ("head", "dim", "channel", "chs", "feature", "group", "hidden", "planes", "width", "inner", "size", "num")
_WIDTH_NAMES = ("head", "dim", "channel", "chs", "feature", "hidden", "planes")
"""What nobody calls anything else than a width."""


class Different(Exception):
    """The edited module doesn't compute what the cut graph computes; the message says where."""


def cut_module(cut: Cut, graph: fx.GraphModule, args: Any, kwargs: Mapping[str, Any]) -> nn.Module:
    """A copy of the traced module, cut; proved to equal ``graph``. Raises Different, with the reason."""
    problem: Different | None = None
    for edits in _attempts(cut):
        module = shell(cut.trace.module)
        _put_tensors(cut, module)
        _edit(module, edits)
        # parameters know better than a guess
        _recompute(module)
        state_sizes(module)
        try:
            _prove(graph, module, args, kwargs, cut.trace.dynamic_shapes)
        except Different as error:
            problem = problem or error
            continue

        def proved(module: nn.Module = module) -> bool:
            try:
                _prove(graph, module, args, kwargs, cut.trace.dynamic_shapes)
            except Different:
                return False
            return True

        _put_back(cut.trace.module, module, _doubtful(module, edits), proved)
        return module
    assert problem is not None
    raise problem


def shell(module: nn.Module) -> nn.Module:
    """A copy of a module that shares its tensors."""
    tensors = [*module.parameters(), *module.buffers()]
    attributes = [v for part in module.modules() for v in part.__dict__.values() if isinstance(v, Tensor)]
    # what was computed from parameters, as old hooks leave it, can't be copied; it is computed again
    computed = {id(v): v.detach() for v in attributes if not v.is_leaf}
    return copy.deepcopy(module, computed | {id(t): t for t in tensors})


def _put_tensors(cut: Cut, module: nn.Module) -> None:
    done: dict[int, Tensor] = {}
    for name, value in cut.trace.parameters.items():
        path, _, leaf = name.rpartition(".")
        try:
            owner = module.get_submodule(path)
        except AttributeError:
            continue  # a constant that export made
        tensor = getattr(owner, leaf, None)
        if isinstance(tensor, Tensor) and (leaf in owner._parameters or leaf in owner._buffers):
            if id(tensor) not in done:
                made = cut_tensor(cut, value, tensor)
                done[id(tensor)] = done[id(made)] = made
            setattr(owner, leaf, done[id(tensor)])


def _recompute(module: nn.Module) -> None:
    """The old ``weight_norm`` and ``spectral_norm`` of torch leave the weight of the last call behind."""
    with torch.no_grad():
        for part in module.modules():
            for hook in part._forward_pre_hooks.values():
                if isinstance(hook, WeightNorm):
                    setattr(part, hook.name, hook.compute_weight(part))
                elif isinstance(hook, SpectralNorm):
                    setattr(part, hook.name, hook.compute_weight(part, do_power_iteration=False))


def state_sizes(module: nn.Module) -> None:
    """Modules of torch state the sizes of their parameters."""
    for part in module.modules():
        weight = getattr(part, "weight", None)
        if isinstance(part, nn.modules.conv._ConvNd):
            _state_convolution(part)
        elif isinstance(part, nn.Linear):
            part.out_features, part.in_features = part.weight.shape
        elif isinstance(part, nn.Embedding):
            part.num_embeddings, part.embedding_dim = part.weight.shape
        elif isinstance(part, nn.modules.batchnorm._NormBase):
            first = next((t for t in (part.weight, part.running_mean) if t is not None), None)
            part.num_features = part.num_features if first is None else len(first)
        elif isinstance(part, nn.GroupNorm) and isinstance(weight, Tensor):
            part.num_channels = len(weight)
        elif isinstance(part, nn.LayerNorm | nn.RMSNorm) and isinstance(weight, Tensor):
            part.normalized_shape = tuple(weight.shape)
        elif isinstance(part, nn.PReLU):
            part.num_parameters = len(part.weight)
        elif isinstance(part, nn.RNNBase):
            part.input_size = part.weight_ih_l0.shape[1]  # type: ignore[union-attr]
            if not part.proj_size:
                part.hidden_size = part.weight_hh_l0.shape[1]  # type: ignore[union-attr]
            part._flat_weights = [getattr(part, name) for name in part._flat_weights_names]
        elif isinstance(part, nn.RNNCellBase):
            part.input_size, part.hidden_size = part.weight_ih.shape[1], part.weight_hh.shape[1]
        elif isinstance(part, nn.MultiheadAttention):
            _state_attention(part)


def _state_convolution(part: nn.modules.conv._ConvNd) -> None:
    first, second = part.weight.shape[:2]
    if part.transposed:
        # groups follow from the call, see _edit_attributes
        part.in_channels, part.out_channels = first, second * part.groups
    else:
        part.out_channels, part.in_channels = first, second * part.groups


def _state_attention(part: nn.MultiheadAttention) -> None:
    part.kdim = part.vdim = part.embed_dim = part.out_proj.weight.shape[0]


Edits = dict[tuple[str, str], Any]
"""(path of a module, name of an attribute) → its new value."""


def _attempts(cut: Cut) -> Iterator[Edits]:
    """The sets of attributes that may have to change, the likeliest first."""
    found = _candidates(cut)
    tried: list[Edits] = []
    for named_for_sizes in (False, True):
        for choice in range(2):
            edits = {
                place: values[min(choice, len(values) - 1)]
                for place, values in found.items()
                if not named_for_sizes or any(part in place[1] for part in _SIZE_NAMES)
            }
            if edits not in tried:
                tried.append(edits)
                yield edits


def _edit(module: nn.Module, edits: Edits) -> None:
    for (path, name), value in edits.items():
        setattr(module.get_submodule(path), name, value)


def _doubtful(module: nn.Module, edits: Edits) -> list[Edits]:
    """The edits of attributes that may be no sizes at all, by class and name: all objects of a class read the same."""
    found: dict[tuple[type, str], Edits] = {}
    for (path, name), value in edits.items():
        part = module.get_submodule(path)
        if not of_torch(part) and not any(word in name for word in _WIDTH_NAMES):
            found.setdefault((type(part), name), {})[path, name] = value
    return list(found.values())


def _put_back(before: nn.Module, module: nn.Module, doubtful: list[Edits], proved: Callable[[], bool]) -> None:
    """Give attributes their old values wherever the proof holds with them, halving those that it needs."""
    if not doubtful:
        return
    edits = {place: value for some in doubtful for place, value in some.items()}
    _edit(module, {(path, name): before.get_submodule(path).__dict__[name] for path, name in edits})
    if proved():
        return
    _edit(module, edits)
    if len(doubtful) > 1:
        middle = len(doubtful) // 2
        for half in (doubtful[:middle], doubtful[middle:]):
            _put_back(before, module, half, proved)


def _candidates(cut: Cut) -> dict[tuple[str, str], list[Any]]:
    """Attributes that hold a number which the cut changes in a call of their module, and what it becomes there.

    Two dimensions of one size may become two different sizes: then an attribute has several candidates.
    """
    found: dict[tuple[str, str], list[Any]] = {}
    for node in cut.trace.calls():
        for old, new in _changes(cut, node):
            for path, part in _owners(cut.trace.module, module_of(node)):
                names = [n for n, v in part.__dict__.items() if not n.startswith("_") and _same(v, old)]
                for name in names:
                    value = tuple(new) if isinstance(part.__dict__[name], tuple) else new
                    known = found.setdefault((path, name), [])
                    if value not in known:
                        known.append(value)
                if names:
                    break
    return found


def _changes(cut: Cut, node: fx.Node) -> Iterator[tuple[Any, Any]]:
    """(old, new) for every number that the cut changes in a call."""
    if not hasattr(node.target, "_schema"):
        return
    name = node.target._schema.name  # type: ignore[union-attr]
    if name not in RESIZERS:
        return
    value = cut.trace.values[node]
    found = resized(cut, node)
    if found is not None and found[0] is node.target:
        before = named_arguments(node)
        for key, new in found[1].items():
            old = before.get(key)
            if isinstance(new, int) and isinstance(old, int) and new != old:
                yield old, new
            elif isinstance(new, list) and isinstance(old, list | tuple) and list(old) != new:
                yield list(old), new
    for one in [value] if isinstance(value, Value) else value:
        for labels in one.dims:
            if cut.size(labels) != len(labels):
                yield len(labels), cut.size(labels)


def _owners(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """The module at a path, then those around it, each with its path."""
    names = path.split(".") if path else []
    for depth in range(len(names), -1, -1):
        try:
            yield ".".join(names[:depth]), module.get_submodule(".".join(names[:depth]))
        except AttributeError:
            continue


def _same(value: Any, old: Any) -> bool:
    if isinstance(old, list):
        return isinstance(value, list | tuple) and list(value) == old
    return type(value) is int and value == old


def _prove(graph: fx.GraphModule, module: nn.Module, args: Any, kwargs: Mapping[str, Any], dynamic_shapes: Any) -> None:
    try:
        again = export(module, args, kwargs, known=has_rule, dynamic_shapes=dynamic_shapes).graph_module()
    except SecateurError as error:
        raise Different(str(error)) from None
    pairs: dict[fx.Node, fx.Node] = {}
    wanted, found = _computing(graph), _computing(again)  # type: ignore[arg-type]
    for left, right in zip(wanted, found, strict=False):
        problem = _difference(graph, again, left, right, pairs)  # type: ignore[arg-type]
        if problem:
            raise Different(f"{describe(left)} {problem}")
        pairs[left] = right
    if len(wanted) != len(found):
        raise Different(f"the edited module makes {len(found)} calls, not {len(wanted)}")


def _computing(graph: fx.GraphModule) -> list[fx.Node]:
    """The nodes in the order of the calls; attributes come with the call that reads them."""
    return [n for n in graph.graph.nodes if n.op in ("placeholder", "call_function")]


def _difference(
    graph: nn.Module, again: nn.Module, left: fx.Node, right: fx.Node, pairs: Mapping[fx.Node, fx.Node]
) -> str | None:
    if left.op != right.op or _kind(left) != _kind(right):
        return f"became {describe(right)}"
    if left.op == "placeholder":
        return None
    shapes = [_shapes(n) for n in (left, right)]
    if shapes[0] != shapes[1]:
        return f"gives {shapes[1]} in the edited module, not {shapes[0]}"
    for one, other in zip(left.all_input_nodes, right.all_input_nodes, strict=False):
        if not _same_input(graph, again, one, other, pairs):
            return "reads something else in the edited module"
    if len(left.all_input_nodes) != len(right.all_input_nodes):
        return "reads something else in the edited module"
    if _kind(left).rpartition("::")[2] not in _BY_SHAPE and _plain(left) != _plain(right):
        return f"has other arguments in the edited module: {_plain(right)}, not {_plain(left)}"
    return None


def _kind(node: fx.Node) -> str:
    schema = getattr(node.target, "_schema", None)
    name = schema.name if schema is not None else str(node.target)
    return "aten::split" if name in _SPLITS else name


def _shapes(node: fx.Node) -> Any:
    value = node.meta.get("val")
    return [sizes(v) for v in value] if isinstance(value, list | tuple) else sizes(value)


def _same_input(
    graph: nn.Module, again: nn.Module, one: fx.Node, other: fx.Node, pairs: Mapping[fx.Node, fx.Node]
) -> bool:
    if pairs.get(one) is other:
        return True
    one, other = _copied(one), _copied(other)
    if one.op != "get_attr" or other.op != "get_attr":
        return False
    first, second = attribute(graph, str(one.target)), attribute(again, str(other.target))
    if not isinstance(first, Tensor) or not isinstance(second, Tensor):
        return str(one.target) == str(other.target)
    if first.is_meta or second.is_meta or str(one.target) == str(other.target):
        return first.shape == second.shape
    return first.shape == second.shape and torch.equal(first, second)


def _copied(node: fx.Node) -> fx.Node:
    """The constant of which a node is a copy, or the node: an index that a cut renumbered needs no copy."""
    return node.all_input_nodes[0] if _kind(node) in ("aten::clone", "aten::lift_fresh_copy") else node


def _plain(node: fx.Node) -> Any:
    """The arguments of a call that aren't tensors, defaults filled in."""
    if not hasattr(node.target, "_schema"):
        return node.args[1:]
    defaults = {a.name: a.default_value for a in node.target._schema.arguments if a.has_default_value()}  # type: ignore[union-attr]
    given = defaults | named_arguments(node)
    if "slice" in node.target._schema.name:  # type: ignore[union-attr]
        return _bounds(node, given)
    return fx.map_arg({k: list(v) if isinstance(v, tuple) else v for k, v in given.items()}, lambda n: "tensor")


def _bounds(node: fx.Node, given: Mapping[str, Any]) -> Any:
    source = sizes(node.args[0].meta["val"])  # type: ignore[union-attr]
    dim = given["dim"] % len(source)
    start, end = (hint(given[k]) if not isinstance(given[k], fx.Node) else None for k in ("start", "end"))
    return dim, slice(start, end, given["step"]).indices(source[dim])
