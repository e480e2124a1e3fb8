"""What weights read on calibration inputs, and fitting those that stay to it.

Both are walks over the traced graph, in which the user's module has no part. The first takes the Gram matrix of the
inputs of every weight in the dense network, batch by batch. The second changes weights call by call, on all batches at
once, and puts what they become into the plan.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx

from secateur.errors import DataError, NonFiniteError
from secateur.finite import all_finite
from secateur.methods import ChannelMethod, Consumer, Fitting
from secateur.networks.calibrating import Calibration
from secateur.networks.deciding import noted
from secateur.observe import Gram, Moments
from secateur.plans import Plan
from secateur.structure.groups import TracedAnatomy
from secateur.structure.readers import Reader, Readers, Rows, canonical_names, find_readers
from secateur.structure.resize import Cut, named_arguments
from secateur.structure.trace import Trace, describe
from secateur.structure.walk import Batch, Tensors, Walk

Place = tuple[fx.Node, Rows, int]
"""What readers have in common that see the same inputs."""


@dataclass(frozen=True)
class Seen:
    """The weights that read channels, with the Gram matrices of their inputs in the dense network."""

    anatomy: TracedAnatomy
    readers: Readers
    grams: Mapping[Place, Gram]
    moments: Mapping[fx.Node, Moments] = field(default_factory=dict)
    """What batch norms see in the dense network, where that is asked for."""

    def uses(self, reader: Reader) -> list[Reader]:
        """The readers that apply the same matrix."""
        return [other for other in self.readers.found if other.weight_key == reader.weight_key]

    def gram(self, reader: Reader) -> Gram:
        """The Gram matrix of all inputs to which the matrix of ``reader`` is applied."""
        places = [_place(one) for one in self.uses(reader)]
        if len(places) == 1:
            return self.grams[places[0]]
        together = Gram()
        for place in places:
            together.merge(self.grams[place])
        return together

    def consumers(self) -> dict[str, tuple[Consumer, ...]]:
        """By group, the weights that read its channels."""
        module = self.anatomy.trace.module
        weights = {name: p.detach() for name, p in module.named_parameters(remove_duplicate=False)}
        once = {reader.weight_key: reader for reader in reversed(self.readers.found)}
        matrices = {k: (_matrix(weights[r.parameter], r), self.gram(r)) for k, r in reversed(once.items())}
        found: dict[str, tuple[Consumer, ...]] = {}
        for group in self.anatomy.of_kind("channel"):
            mine = []
            for key, (weight, gram) in matrices.items():
                columns = once[key].columns(self.anatomy.trace, self.anatomy.ids[group.name])
                if any(len(c) for c in columns):
                    mine.append(Consumer(_label(once[key]), weight, gram, columns))
            found[group.name] = tuple(mine)
        return found


def observe(anatomy: TracedAnatomy, calibration: Calibration, *, norms: str = "stored") -> Seen:
    """Run the dense network on every batch. ``norms`` as in ``Fitting``: with ``own``, batch norms work with the
    statistics of all batches; with ``shift``, what they see is remembered.

    Raises NonFiniteError, or DataError where there are no statistics.
    """
    readers = find_readers(anatomy.trace)
    grams: dict[Place, Gram] = {}
    moments: dict[fx.Node, Moments] = {}
    found = _batch_norms(anatomy.trace) if norms in ("own", "shift") else {}
    order = list(anatomy.trace.graph.nodes)
    last = max((*readers.by_node, *found), key=order.index, default=None)
    batches = [Batch(traced.trace, inputs) for traced, inputs in calibration]
    # norms that work with their own statistics need all batches at a time, anything else only one
    for together in [batches] if norms == "own" else [[batch] for batch in batches]:
        walk, seen = Walk(anatomy.trace, together), set[Place]()

        def visit(node: fx.Node, tensors: Tensors, walk: Walk = walk, seen: set[Place] = seen) -> None:
            mine = [reader for reader in readers.by_node.get(node, ()) if _place(reader) not in seen]
            seen |= {_place(reader) for reader in mine}
            _update(grams, mine, tensors)
            if node in found and norms == "own":
                _set_norm(walk, found[node], *_statistics(node, _moments(node, tensors)))
            elif node in found:
                moments.setdefault(node, Moments()).merge(_moments(node, tensors))

        if last is not None:
            with torch.no_grad():
                walk.run(visit, until=last)
    _check_finite(grams, readers.found)
    return Seen(anatomy, readers, grams, moments)


def fitted(method: ChannelMethod, plan: Plan, seen: Seen, calibration: Calibration) -> Plan:
    """The plan with what the weights that stay become, if the method fits any. Raises DataError or NonFiniteError."""
    how, anatomy = method.fitting(), seen.anatomy
    if how is None:
        return plan
    notes = list(_left_out(plan, seen))
    if all(len(kept) == plan.groups[name] for name, kept in plan.keep.items()):
        return noted(plan, notes)
    removed = {name: plan.removed(name) for name in plan.keep}
    cuts = {id(traced): Cut(traced.trace, traced.units_removed(removed)) for traced, _ in calibration}
    batches = [Batch(traced.trace, inputs, cuts[id(traced)]) for traced, inputs in calibration]
    cut = Cut(anatomy.trace, anatomy.units_removed(removed))
    fit = _Fit(method, how, seen, cut, batches)
    with torch.no_grad():
        fit.run()
    masks, values = {}, {}
    for name in fit.found:
        tensor = fit.walk.changed[name]
        masks[name] = kept_entries(cut, name)
        values[name] = tensor.cpu()[masks[name]]
    return noted(replace(plan, masks=masks, values=values), notes + fit.notes)


def kept_entries(cut: Cut, name: str) -> Tensor:
    """Which entries of a parameter or buffer stay, bool, shaped like it."""
    value = cut.trace.parameters[name]
    mask = torch.ones(value.shape, dtype=torch.bool)
    for dim, labels in enumerate(value.dims):
        kept = torch.from_numpy(cut.kept(labels))
        mask &= kept.reshape([-1 if d == dim else 1 for d in range(mask.dim())])
    return mask


class _Fit:
    """One walk that fits weights and statistics of norms where something before them has changed."""

    def __init__(self, method: ChannelMethod, how: Fitting, seen: Seen, cut: Cut, batches: Sequence[Batch]) -> None:
        self.notes: list[str] = []
        self.found: list[str] = []
        """Names of what the network gets."""
        self._method, self._how, self._seen, self._cut = method, how, seen, cut
        self._norms = _batch_norms(cut.trace) if how.norms != "stored" else {}
        # columns that leave are zero, and norms in evaluation mode work channel by channel
        self.walk = Walk(cut.trace, batches, whole={*seen.readers.by_node, *_batch_norms(cut.trace)})
        self._done: set[tuple[str, int]] = set()
        self._changed: set[fx.Node] = set()

    def run(self) -> None:
        if self._how.sequential or self._how.norms in ("refit", "shift"):
            fitted = {*self._seen.readers.by_node, *self._norms}
            self.walk.run(self._visit, until=max(fitted, key=list(self._cut.trace.graph.nodes).index))
            return
        for readers in self._seen.readers.by_node.values():
            self._refit(readers, None)

    def _visit(self, node: fx.Node, tensors: Tensors) -> None:
        refitted = self._refit(self._seen.readers.by_node.get(node, ()), tensors)
        if refitted or self.walk.mixes(node) or not self._changed.isdisjoint(node.all_input_nodes):
            self._changed.add(node)
        if node in self._norms and (self._how.norms == "own" or node in self._changed):
            now = _statistics(node, _moments(node, tensors))
            if self._how.norms == "shift":
                stored = [self.walk.tensor(name).double() for name in self._norms[node]]
                now = _shifted(stored, _statistics(node, self._seen.moments[node]), now)
            _set_norm(self.walk, self._norms[node], *now)
            self.found += () if self._how.norms == "own" else self._norms[node]

    def _refit(self, readers: Sequence[Reader], tensors: Tensors | None) -> bool:
        """Fit the matrices of one call; whether any of their columns leave."""
        leaving = [reader for reader in readers if bool(self._gone(reader).any())]
        todo = [reader for reader in leaving if reader.weight_key not in self._done]
        # a weight that is applied several times would need inputs of later calls
        alone = {
            _place(r) for r in todo if tensors is not None and self._how.sequential and len(self._seen.uses(r)) == 1
        }
        grams: dict[Place, Gram] = {}
        if tensors is not None:
            _update(grams, [r for r in todo if _place(r) in alone], tensors)
            _check_finite(grams, readers)
        for reader in todo:
            self._done.add(reader.weight_key)
            weight = self.walk.tensor(reader.parameter)
            gram = grams[_place(reader)] if _place(reader) in alone else self._seen.gram(reader)
            consumer = Consumer(_label(reader), _matrix(weight, reader), gram)
            matrix, notes = self._method.compensate(consumer, self._gone(reader).to(weight.device))
            entries = reader.entries.flatten().to(weight.device)
            self.notes += notes
            self.found += () if reader.parameter in self.found else (reader.parameter,)
            self.walk.changed[reader.parameter] = (
                weight.flatten().index_copy(0, entries, matrix.flatten().to(weight.dtype)).reshape(weight.shape)
            )
        return bool(leaving)

    def _gone(self, reader: Reader) -> Tensor:
        """Columns that leave, bool."""
        return torch.from_numpy(~self._cut.kept(reader.labels)).repeat_interleave(reader.width)


def _moments(node: fx.Node, tensors: Tensors) -> Moments:
    """What a batch norm is about to see, channel by channel."""
    seen = Moments()
    for x in tensors(node.all_input_nodes[0]):
        seen.update(x.movedim(1, -1).reshape(1, -1, x.shape[1]))
    return seen


def _statistics(node: fx.Node, seen: Moments) -> tuple[Tensor, Tensor]:
    """Mean and variance, [channels] float64. Raises DataError."""
    if seen.count < 2:
        raise DataError(f"{describe(node)} sees one entry per channel in all of the data: give more of it")
    return seen.mean_C, seen.variance()


def _shifted(
    stored: Sequence[Tensor], before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Stored mean and variance, moved as those of the data moved: the mean by a difference, the variance by a ratio.

    What few data say by chance, or other data than those of training, is in ``before`` as in ``after``.
    """
    mean = stored[0] + (after[0] - before[0])
    # a channel that was constant has no ratio
    variance = torch.where(before[1] > 0, stored[1] * after[1] / before[1], stored[1] + after[1])
    return mean, variance


def _set_norm(walk: Walk, names: tuple[str, str], mean: Tensor, variance: Tensor) -> None:
    """Let a batch norm work with these statistics."""
    for name, found in zip(names, (mean, variance), strict=True):
        walk.changed[name] = found.to(walk.tensor(name))


def _batch_norms(trace: Trace) -> dict[fx.Node, tuple[str, str]]:
    """Calls of batch norms in evaluation mode, with the names of their running mean and variance.

    Norms that are called several times are left out: they have one mean for several inputs.
    """
    names = canonical_names(trace)
    found = {}
    for node in trace.calls():
        if "batch_norm" not in getattr(node.target, "__name__", ""):
            continue
        given = named_arguments(node)
        mean, variance = given.get("running_mean"), given.get("running_var")
        if isinstance(mean, fx.Node) and isinstance(variance, fx.Node) and mean.op == variance.op == "get_attr":
            found[node] = (names[str(mean.target)], names[str(variance.target)])
    several = [pair for pair in found.values()]
    return {node: pair for node, pair in found.items() if several.count(pair) == 1}


def _update(grams: dict[Place, Gram], readers: Sequence[Reader], tensors: Tensors) -> None:
    """Take in what readers read now; the patches of a convolution are made once for all its matrices."""
    matrices: dict[tuple[fx.Node, Rows], set[int]] = {}
    for reader in readers:
        matrices.setdefault((reader.source, reader.rows), set()).add(reader.matrix)
    for (source, rows), wanted in matrices.items():
        for x in tensors(source):
            for part in rows(x):
                for matrix in sorted(wanted):
                    grams.setdefault((source, rows, matrix), Gram()).update(part[:, matrix].unsqueeze(0))


def _check_finite(grams: Mapping[Place, Gram], readers: Sequence[Reader]) -> None:
    for reader in readers:
        gram = grams.get(_place(reader))
        if gram is not None and not all_finite(gram.total_CC):
            raise NonFiniteError(f"the inputs of {_label(reader)} hold NaN or inf on the data that was given")


def _left_out(plan: Plan, seen: Seen) -> Iterable[str]:
    """What isn't fitted, and which groups stay since nothing is known of what reads them."""
    removed = {name: plan.removed(name) for name in plan.keep}
    cut = Cut(seen.anatomy.trace, seen.anatomy.units_removed(removed))
    for node, names in seen.readers.others.items():
        touched = [name for name in names if cut.touches(cut.trace.parameters[name])]
        if touched:
            yield f"{describe(node)} reads {', '.join(touched)} in its own way, so it isn't fitted"
    for group in seen.anatomy.of_kind("channel"):
        if group.name not in plan.keep:
            yield f"{group.name} stays: no weight that can be fitted reads it"


def _place(reader: Reader) -> Place:
    return (reader.source, reader.rows, reader.matrix)


def _label(reader: Reader) -> str:
    return f"{reader.parameter} (matrix {reader.matrix})" if reader.matrix else reader.parameter


def _matrix(parameter: Tensor, reader: Reader) -> Tensor:
    return parameter.flatten()[reader.entries.to(parameter.device)].double()
