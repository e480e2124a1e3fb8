"""One model of ``breadth.py`` cut by one library, and held to the dense model in which the same slices are masked."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from zoo import Case, Entry, prepare, tensors_of

from secateur.errors import SecateurError
from secateur.structure import trace as tracing
from secateur.structure.anatomy import Group
from secateur.structure.graphcut import Reference, cut_graph
from secateur.structure.groups import TracedAnatomy, traced_anatomy
from secateur.structure.modulecut import Different, cut_module
from secateur.structure.resize import Cut

TOLERANCE = 1e-3
"""Largest error of a cut that counts as exact: relative to the largest output, and to what the cut changes in it."""

Row = dict[str, Any]


def relative_error(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Largest difference in units of the largest entry; infinite when shapes differ or something isn't finite."""
    if [f.shape for f in found] != [w.shape for w in wanted]:
        return float("inf")
    errors = [float((f - w).abs().max() / (w.abs().max() + 1e-30)) for f, w in zip(found, wanted, strict=True)]
    return max((e if np.isfinite(e) else float("inf") for e in errors), default=float("inf"))


def run(module: nn.Module, case: Case) -> tuple[list[Tensor], int]:
    """(outputs, multiply-accumulates by torch's own counter)."""
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)

    # the counter doesn't know what attention is fused into on a CPU
    torch.backends.mha.set_fastpath_enabled(False)
    fused = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}
    trained = [p for p in module.parameters() if p.requires_grad]
    module.requires_grad_(False)  # its hooks stumble over parameters that are given to modules as inputs
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=fused) as counter:
        outputs = module(*case.args, **case.kwargs)
    for parameter in trained:
        parameter.requires_grad_(True)
    return tensors_of(outputs), counter.get_total_flops() // 2


# -- secateur ----------------------------------------------------------------------------------------------------------


def secateur(entry: Entry, fraction: float, ranking: str = "mean") -> Row:
    """exact, wrong or refused; refused is a SecateurError, whose sentence is the reason."""
    case = prepare(entry)
    dense, macs = run(case.module, case)
    row: Row = {"note": case.note} if case.note else {}
    try:
        with _export_timed(row):
            start = time.process_time()
            found = tracing.trace(case.module, case.args, case.kwargs)
        row["trace s"] = time.process_time() - start - row["export s"]
        with _timed(row, "group s"):
            anatomy = traced_anatomy(found)
        removed = lowest(case.module, anatomy, fraction, ranking)
        row |= _about(anatomy, removed)
        if not removed:
            return {**row, "class": "refused", "reason": _why_nothing(anatomy)}
        cut = Cut(found, removed)
        with _timed(row, "cut s"):
            graph = cut_graph(cut)
    except SecateurError as error:
        return {**row, "class": "refused", "reason": str(error)}
    got, macs_after = run(graph, case)
    row |= _reductions(anatomy, removed, macs, macs_after)
    leaves = tree_leaves((case.args, dict(case.kwargs)))
    program = found.exported.graph_module()
    program.recompile()
    with torch.no_grad():
        unmasked = tensors_of(program(*case.args, **case.kwargs))
        wanted = tensors_of(Reference(found, removed, program).run(*leaves))
    row["error"] = max(relative_error(got, wanted), relative_error(unmasked, dense))
    row["effect"] = relative_error(wanted, dense)
    row["class"] = "exact" if row["error"] <= TOLERANCE * min(1, row["effect"]) else "wrong"
    with _timed(row, "module s"):
        row |= _own_module(cut, graph, case)
    return row


def lowest(module: nn.Module, anatomy: TracedAnatomy, fraction: float, ranking: str) -> set[int]:
    """The units with the smallest L1 norm of all groups; one of each stays.

    Norms count relative to the mean of their group, or standardised in it.
    """
    groups = [g for g in anatomy.groups if g.frozen is None and g.units > 1]
    tensors = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}
    candidates: list[tuple[float, int]] = []
    total = 0
    for group in groups:
        score = l1(group, tensors)
        ids = (anatomy.ids or {})[group.name]
        order = score.argsort()[:-1].tolist()  # without its best
        relative = (score - score.mean()) / score.std() if ranking == "standardised" else score / score.mean()
        candidates += [(float(relative[u]), ids[u]) for u in order]
        total += group.units
    return {unit for _, unit in sorted(candidates)[: round(fraction * total)]}


def l1(group: Group, tensors: Mapping[str, Tensor]) -> Tensor:
    """Sum of |theta| over the slices of each unit, [units] float64."""
    score = torch.zeros(group.units, dtype=torch.float64)
    for part in group.slices:
        tensor = tensors.get(part.tensor)
        if tensor is not None and tensor.is_floating_point():
            along = tensor.detach().abs().movedim(part.dim, 0).flatten(1).sum(1) if tensor.dim() > 1 else tensor.abs()
            score += along.double()[part.index].sum(1).detach()
    return score


def _about(anatomy: TracedAnatomy, removed: set[int]) -> Row:
    ids = anatomy.ids or {}
    touched = [g for g in anatomy.groups if removed & set(ids[g.name])]
    averages = sorted({g.inexact for g in touched if g.inexact})
    assert anatomy.trace is not None
    return {
        "groups": len(anatomy.groups),
        "frozen groups": sum(g.frozen is not None for g in anatomy.groups),
        "averages": ", ".join(a.removesuffix(" runs over it") for a in averages),
        "unknown": ", ".join(f"{name}: {places[0]}" for name, places in anatomy.trace.unknown.items()),
    }


def _reductions(anatomy: TracedAnatomy, removed: set[int], before: int, after: int) -> Row:
    assert anatomy.costs is not None
    cost = anatomy.costs.without(removed)
    return {
        "macs fall": 1 - after / max(before, 1),
        "macs foreseen": 1 - cost.macs / max(anatomy.total.macs, 1),
        "params fall": 1 - cost.params / max(anatomy.total.params, 1),
    }


def _why_nothing(anatomy: TracedAnatomy) -> str:
    frozen = anatomy.frozen[0].reason if anatomy.frozen else "it has no groups"
    return f"nothing can leave: {frozen}"


def _own_module(cut: Cut, graph: Any, case: Case) -> Row:
    try:
        module = cut_module(cut, graph, case.args, case.kwargs)
    except Different as error:
        return {"form": "graph", "why graph": str(error)}
    with torch.no_grad():
        error = relative_error(
            tensors_of(module(*case.args, **case.kwargs)), tensors_of(graph(*case.args, **case.kwargs))
        )
    return {"form": "module"} if error <= TOLERANCE else {"form": "module", "class": "wrong", "module error": error}


@contextmanager
def _timed(row: Row, name: str) -> Iterator[None]:
    start = time.process_time()
    try:
        yield
    finally:
        row[name] = time.process_time() - start


@contextmanager
def _export_timed(row: Row) -> Iterator[None]:
    """Time the part of tracing that is torch.export's."""
    original = tracing.export

    def timed(*args: Any, **kwargs: Any) -> Any:
        with _timed(row, "export s"):
            return original(*args, **kwargs)

    tracing.export = timed
    try:
        yield
    finally:
        tracing.export = original


# -- Torch-Pruning -----------------------------------------------------------------------------------------------------

NORMALIZER = {"mean": "mean", "standardised": "gaussian"}
"""Its names of the rankings."""


def torch_pruning(entry: Entry, fraction: float, ranking: str = "mean") -> Row:
    """exact, differs, runs (nothing to hold it to) or fails, with the error."""
    import torch_pruning as tp

    case = prepare(entry)
    dense, macs = run(case.module, case)
    pruned = copy.deepcopy(case.module)
    row: Row = {}
    try:
        with _timed(row, "trace s"):
            pruner = tp.pruner.MagnitudePruner(
                pruned,
                example_inputs=dict(case.kwargs) or case.args,
                importance=tp.importance.GroupMagnitudeImportance(p=1, normalizer=NORMALIZER[ranking]),
                global_pruning=True,
                pruning_ratio=fraction,
                ignored_layers=final_layers(pruned, case),
            )
        with _timed(row, "cut s"):
            pruner.step()
        got, macs_after = run(pruned, case)
    except Exception as error:  # any of them is the result of this row
        return {**row, "class": "fails", "reason": first_line(error)}
    row["macs fall"] = 1 - macs_after / max(macs, 1)
    before, after = (sum(p.numel() for p in m.parameters()) for m in (case.module, pruned))
    row["params fall"] = 1 - after / max(before, 1)
    return row | _judged(case, pruned, got, dense)


def final_layers(module: nn.Module, case: Case) -> list[nn.Module]:
    """Layers as wide as there are classes, and those whose output is an output of the network."""
    made: list[tuple[nn.Module, Tensor]] = []
    layers = [m for m in module.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    hooks = [m.register_forward_hook(lambda m, _, out: made.append((m, out))) for m in layers]
    with torch.no_grad():
        outputs = {t.untyped_storage().data_ptr() for t in tensors_of(module(*case.args, **case.kwargs))}
    for hook in hooks:
        hook.remove()
    last = [m for m, out in made if out.untyped_storage().data_ptr() in outputs]
    return list(dict.fromkeys(last + [m for m in layers if m.weight.shape[0] == case.classes]))


def _judged(case: Case, pruned: nn.Module, got: list[Tensor], dense: list[Tensor]) -> Row:
    """Hold the pruned model to the dense one with zeros where entries are gone, then to our reference for them."""
    if [g.shape for g in got] != [d.shape for d in dense]:
        return {"class": "fails", "reason": "its outputs have other shapes"}
    if not all(g.isfinite().all() for g in got):
        return {"class": "differs", "reason": "its outputs aren't finite"}
    kept = survivors(case.module, pruned)
    if kept is None:
        return {"class": "runs", "reason": "its parameters aren't parts of the dense ones"}
    if all(all(len(k) == n for k, n in zip(dims, shape, strict=True)) for dims, shape in kept.values()):
        return {"class": "fails", "reason": "it removes nothing"}
    tolerance = TOLERANCE * min(1, relative_error(got, dense))
    error = relative_error(got, zeroed_outputs(case, kept))
    if error <= tolerance:
        return {"class": "exact", "error": error}
    try:
        found = tracing.trace(case.module, case.args, case.kwargs)
    except SecateurError:
        return {"class": "runs", "error": error, "reason": "no reference: it can't be traced"}
    removed, consistent = removed_units(found, kept)
    if not consistent:
        averages = any(not isinstance(m, nn.modules.batchnorm._BatchNorm) for m in normalisations(case.module))
        reason = "not the dense model with zeros; what it removed isn't whole units of our trace"
        return {"class": "runs" if averages else "differs", "error": error, "reason": reason}
    with torch.no_grad():
        reference = Reference(found, removed).run(*tree_leaves((case.args, dict(case.kwargs))))
    error = relative_error(got, tensors_of(reference))
    return {"class": "exact" if error <= tolerance else "differs", "error": error}


Kept = dict[str, tuple[list[np.ndarray], tuple[int, ...]]]


def survivors(dense: nn.Module, pruned: nn.Module) -> Kept | None:
    """By parameter: positions that are left of every dimension, and the dense shape. Entries are found by value."""
    found: Kept = {}
    after = dict(pruned.named_parameters())
    for name, parameter in dense.named_parameters():
        if name not in after or after[name].dim() != parameter.dim():
            return None
        before, now = (t.detach().numpy() for t in (parameter, after[name]))
        dims = _kept_of_each_dim(before, now) if before.ndim else []
        if dims is None or not np.array_equal(before[np.ix_(*dims)] if dims else before, now):
            return None
        found[name] = (dims, before.shape)
    return found


def _kept_of_each_dim(before: np.ndarray, now: np.ndarray) -> list[np.ndarray] | None:
    """Where the lines through the first entry that is left came from."""
    first = np.argwhere(before == now.flat[0]) if now.size else []
    if len(first) != 1:
        return None
    found = []
    for dim in range(before.ndim):
        line, left = before.swapaxes(0, dim), now.swapaxes(0, dim)
        at = first[0].copy()
        at[[0, dim]] = at[[dim, 0]]
        line, left = line[(slice(None), *at[1:])], left[(slice(None), *[0] * (before.ndim - 1))]
        order = line.argsort()
        found.append(order[np.searchsorted(line[order], left).clip(max=len(line) - 1)])
    return found


def zeroed_outputs(case: Case, kept: Kept) -> list[Tensor]:
    """What the dense model gives with zeros for all entries that are gone."""
    module = copy.deepcopy(case.module)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            for dim, (positions, size) in enumerate(zip(*kept[name], strict=True)):
                gone = np.setdiff1d(np.arange(size), positions)
                parameter.index_fill_(dim, torch.from_numpy(gone), 0)
        return tensors_of(module(*case.args, **case.kwargs))


def removed_units(found: tracing.Trace, kept: Kept) -> tuple[set[int], bool]:
    """The units of our trace that are gone, and whether exactly their positions are."""
    removed: set[int] = set()
    for name, (dims, _) in kept.items():
        for labels, positions in (
            zip(found.parameters[name].dims, dims, strict=True) if name in found.parameters else ()
        ):
            table = found.units.table(labels)
            alone = table[np.setdiff1d(np.arange(len(labels)), positions)]
            removed |= set(alone[(alone >= 0).sum(axis=1) == 1].max(axis=1, initial=-1).tolist())
    cut = Cut(found, removed)
    exactly = all(
        np.array_equal(cut.kept(labels).nonzero()[0], positions)
        for name, (dims, _) in kept.items()
        if name in found.parameters
        for labels, positions in zip(found.parameters[name].dims, dims, strict=True)
    )
    return removed, exactly


def normalisations(module: nn.Module) -> list[nn.Module]:
    """Its sub-modules that normalise, by the names of their classes."""
    return [m for m in module.modules() if "norm" in type(m).__name__.lower()]


def first_line(error: BaseException) -> str:
    """``Kind: what it says``, without the rest of a long message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
