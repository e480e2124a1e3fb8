"""The engine: observe → score → allocate → Plan. It owns the loop over blocks; methods only supply the words."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial, singledispatchmethod
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.allocate import lowest_of_all, parse_pattern
from secateur.allocate.units import Limits
from secateur.allocators import (
    Allocator,
    BlockWeights,
    Measuring,
    Part,
    check_follows,
    matrix_sparsities,
    with_sparsity,
)
from secateur.allocators.base import Wishes
from secateur.allocators.trying import Trying
from secateur.budgets import (
    Budgets,
    measure_variants,
    read_losses,
    variants_file,
    variants_of,
    windows_for,
    write_losses,
)
from secateur.errors import BudgetError, DataError, UnsupportedModelError, UsageError
from secateur.heal import BiasHealer, Refit, find
from secateur.heal.refit import few_tokens
from secateur.keeping import Decided, Decision, Keeper, SeenByModule
from secateur.methods import LayerMethod, Method, SearchMethod, Target, UnitMethod, WeightMethod
from secateur.models.decoders import decoder_anatomy, matrix_roles, unknown_family
from secateur.models.sources import Source, check_finite
from secateur.observe import Cross, Gram, Moments, Statistic
from secateur.observe.activations import Activations
from secateur.observe.calibration import Tokens
from secateur.observe.driver import BlockWalk
from secateur.observe.store import read_seen, write_seen
from secateur.ranks import ALONE, Ranks
from secateur.search import MaskDescent, Searched, mean_gradients, token_loss
from secateur.searching import LevelTrials, level_tensors
from secateur.structure import Anatomy, Group, Matrix

Progress = Callable[[str, int, int], None]

SECONDS_BETWEEN_STATES = 30.0
"""Of a search on the whole model; what was done since the last one is done again after a crash."""


def decide(
    method: Method,
    source: Source,
    tokens: Tokens | None,
    *,
    dtype: torch.dtype,
    batch_tokens: int,
    progress: Progress,
    keeper: Keeper | None = None,
    hidden: Activations | None = None,
    statistics: Path | None = None,
    ranks: Ranks = ALONE,
    allocator: Allocator | None = None,
    allocator_statistics: Path | None = None,
    latency_table: Path | None = None,
) -> Keeper:
    """What ``method`` removes from the model of ``source``; ``tokens`` are its calibration windows.

    Blocks that ``keeper`` has finished are left out. ``hidden`` are the activations at that point, or empty ones.
    ``statistics`` is a folder in which those of the dense model are kept, and found again, one file per block.
    Each of the ``ranks`` walks its part of the windows, and all of them decide the same. The ``allocator`` gives
    every matrix its sparsity first; its statistics are kept in ``allocator_statistics``. ``latency_table`` is the file
    of a budget of latency, by default one in the user's cache.
    """
    if allocator is not None:
        check_follows(allocator, method)
    run = _Run(method, source, tokens, dtype, batch_tokens, progress, keeper or Keeper(), hidden, statistics, ranks)
    run.allocator, run.allocator_statistics, run.latency_table = allocator, allocator_statistics, latency_table
    if not run.keeper.closed:
        run.decide(method)
    if isinstance(method, WeightMethod | UnitMethod) and method.refits_later and run.keeper.closed:
        run.refit(method)
    return run.keeper


class _Run:
    def __init__(
        self,
        method: Method | Measuring,
        source: Source,
        tokens: Tokens | None,
        dtype: torch.dtype,
        batch_tokens: int,
        progress: Progress,
        keeper: Keeper,
        hidden: Activations | None,
        statistics: Path | None,
        ranks: Ranks,
    ) -> None:
        if method.uses_data and tokens is None:
            heals = "" if method.statistics else f" with heal={getattr(method, 'heal', '')}"
            raise DataError(f"{method.name}{heals} needs calibration data: give a tokenizer and a calibration text")
        self.method, self.source, self.progress, self.keeper = method, source, progress, keeper
        self.anatomy: Anatomy = decoder_anatomy(source.model, heads=getattr(method, "heads", "kv"))
        self.layers = len(source.blocks)
        self.statistics, self.ranks = statistics, ranks
        self.latency_table: Path | None = None
        self._walk: BlockWalk | None = None
        self.allocator: Allocator | None = None
        self.allocator_statistics: Path | None = None
        self._walk_arguments = (tokens, dtype, batch_tokens, Activations() if hidden is None else hidden)
        self._observed: Mapping[str, type[Statistic]] = method.observed_statistics()
        self._refit = Refit()

    def walk(self) -> BlockWalk | None:
        """The walk over calibration data, begun when it is first needed; None for a method that takes no data."""
        tokens, dtype, batch_tokens, hidden = self._walk_arguments
        if self._walk is None and self._observed and tokens is not None:
            ids = self.ranks.part(tokens.ids)
            dense = hidden.another("dense") if Cross in self._observed.values() else None
            self._walk = BlockWalk(self.source, ids, dtype=dtype, batch_tokens=batch_tokens, hidden=hidden, dense=dense)
            self.keeper.resume(self._walk)
        return self._walk

    @singledispatchmethod
    def decide(self, method: Any) -> None:
        raise UsageError(f"{method.name} is not a post-training method of this engine")

    # -- single weights ------------------------------------------------------------------------------------------

    @decide.register
    def _(self, method: WeightMethod) -> None:
        targets = list(self.anatomy.matrices)
        if not targets:
            raise UnsupportedModelError(f"{type(self.source.model).__name__} has no linear weights in its blocks")
        if method.pattern:
            _check_pattern(method.pattern, targets)
        elif method.sparsity == 0:
            return
        if method.decides_globally:
            self._decide_globally(method, targets)
            return
        allocated = self._allocated(method)
        for layer in self._blocks("prune"):
            part = Decision()
            members = [m for m in targets if m.layer == layer]
            block, seen = self._observe(layer, [m.module for m in members], advance=not method.in_sequence)
            if method.refits and not method.refits_later:
                part.notes += self._few_tokens(layer, seen, method)
            for matrix in members:
                own = allocated.get(matrix.module, method)
                weight = self._prune_matrix(own, matrix, seen.get(matrix.module, {}), part)
                if block is not None and method.in_sequence:
                    _write(block, self._inside(matrix.module), weight, matrix.transposed)
            self._advance(method, block, layer)
            self.keeper.keep(layer, part, final=True, walk=self._walk)
            # so that the next block and its statistics don't meet these in memory
            del block, seen

    def _prune_matrix(self, method: WeightMethod, matrix: Matrix, seen: Mapping[str, Any], part: Decision) -> Tensor:
        """Decide one matrix; returns its pruned weight [outputs, inputs]."""
        target = self._target(matrix.module, "weight", matrix.layer, name=matrix.module)
        keep, weight, notes = method.prune(target, seen)
        part.notes += notes
        if method.refits and not method.refits_later:
            weight, notes = self._refit.weights(target.name, target.weight, keep, seen, weight)
            part.notes += notes
        if weight is None:
            part.masks[matrix.tensor] = (keep.T.contiguous() if matrix.transposed else keep).cpu()
            return target.weight * keep
        self._put(part, matrix.module, weight, keep, matrix.transposed, matrix.layer)
        return weight

    def _allocated(self, method: WeightMethod) -> dict[str, WeightMethod]:
        """The method as it prunes every matrix, by module; nothing without an allocator."""
        if self.allocator is None:
            return {}
        parts = self._parts()
        sparsities = self.ranks.on_main(self.keeper.allocated)
        if sparsities is None:
            sparsities = self._allocate_matrices(self.allocator, method, parts)
        return {part.module: with_sparsity(method, part, sparsities[part.module]) for part in parts}

    def _allocate_matrices(self, allocator: Allocator, method: WeightMethod, parts: list[Part]) -> dict[str, float]:
        """Look at the dense model for the allocator, and keep what it gives every matrix."""
        aside = self.keeper.aside("allocation")
        if isinstance(allocator, Trying) and self.ranks.size > 1:
            raise UsageError(f"allocator {allocator.name} tries whole models out in one process: leave torchrun out")
        if allocator.measures:
            measuring = Measuring(allocator, method)
            tokens, dtype, batch_tokens, hidden = self._walk_arguments
            hidden = hidden.elsewhere(aside.hidden)
            _Run(
                measuring,
                self.source,
                tokens,
                dtype,
                batch_tokens,
                self.progress,
                aside,
                hidden,
                self.allocator_statistics,
                self.ranks,
            ).decide(measuring)

        def choose() -> dict[str, float]:
            if isinstance(allocator, Trying):
                wished = self._searched(allocator, method, parts, aside)
                found = matrix_sparsities(allocator, method, parts, wished=wished)
            else:
                layers = range(self.layers if allocator.measures else 0)
                measured = [aside.ranked(f"block.{layer}") for layer in layers]
                found = matrix_sparsities(allocator, method, parts, measured)
            self.keeper.allocate(found)
            return found

        return self.ranks.on_main(choose)

    def _searched(self, search: Trying, method: WeightMethod, parts: list[Part], aside: Keeper) -> Wishes:
        """The sparsities that a search over whole models finds."""
        tokens, dtype = self._walk_arguments[:2]
        if tokens is None:
            raise DataError(f"allocator {search.name} needs calibration data: give a tokenizer and a calibration text")
        trials = LevelTrials(
            self.source,
            self.anatomy.matrices,
            tokens.ids,
            aside,
            dtype=dtype,
            generations=getattr(search, "generations", 0),
            progress=self.progress,
        )
        return search.at(parts, search.run(parts, method.sparsity, trials), method.sparsity)

    def _parts(self) -> list[Part]:
        """The matrices as allocators see them."""
        roles = matrix_roles(self.source.model)
        return [Part(m.module, m.layer, roles.get(m.module, ""), m.shape) for m in self.anatomy.matrices]

    @decide.register
    def _(self, measuring: Measuring) -> None:
        allocator, method = measuring.allocator, measuring.method
        for layer in self._blocks("allocate"):
            modules = [m.module for m in self.anatomy.matrices if m.layer == layer]
            if allocator.observes == "blocks":
                block = BlockWeights((), {"": self._observe_block(layer)})
            else:
                _, seen = self._observe(layer, modules, advance=True)
                block = BlockWeights(tuple(self._target(m, "weight", layer, name=m) for m in modules), seen)
            if isinstance(allocator, Trying):
                made = allocator.prune_levels(block, method, self._parts())
                ranked = dict(chain(*(level_tensors(*m).items() for m in zip(modules, made, strict=True))))
            else:
                ranked = {f"block.{layer}": allocator.measure(block, method)}
            self.keeper.keep(layer, Decision(), final=False, walk=self._walk, ranked=ranked)
            del block

    def _put(self, part: Decision, module: str, weight: Tensor, keep: Tensor, transposed: bool, layer: int) -> None:
        """New values [outputs, inputs] for what ``keep`` keeps of the weight of a module."""
        check_finite(weight, module, layer, "compensated weights")
        name, stored = f"{module}.weight", keep.T.contiguous() if transposed else keep
        part.masks[name] = stored.cpu()
        kept = (weight.T if transposed else weight)[stored]
        part.values[name] = kept.to(self.source.tensor(name).dtype).cpu()

    def _decide_globally(self, method: WeightMethod, targets: list[Matrix]) -> None:
        """One threshold over all matrices, from statistics of the dense model."""
        for layer in self._blocks("score"):
            members = [m for m in targets if m.layer == layer]
            _, seen = self._observe(layer, [m.module for m in members], advance=True)
            ranked = {}
            for matrix in members:
                target = self._target(matrix.module, "weight", layer, name=matrix.module)
                ranked[matrix.module] = method.score(target, seen.get(matrix.module, {})).float().cpu()
            self.keeper.keep(layer, Decision(), final=False, walk=self._walk, ranked=ranked)
        count = int(sum(m.shape[0] * m.shape[1] for m in targets) * method.sparsity)
        gone = lowest_of_all(lambda: (self.keeper.ranked(m.module) for m in targets), count)

        def parts() -> Iterator[Decision]:
            for matrix, leave in zip(targets, gone, strict=True):
                yield Decision(masks={matrix.tensor: (~leave).T.contiguous() if matrix.transposed else ~leave})

        self.keeper.close(parts())

    # -- single weights, searched on the whole model --------------------------------------------------------------

    @decide.register
    def _(self, method: SearchMethod) -> None:
        targets = list(self.anatomy.matrices)
        if not targets:
            raise UnsupportedModelError(f"{type(self.source.model).__name__} has no linear weights in its blocks")
        if method.sparsity == 0:
            return
        if self.ranks.size > 1:
            raise UsageError(f"{method.name} searches on the whole model, in one process: start it without torchrun")
        tokens, dtype, batch_tokens, _ = self._walk_arguments
        assert tokens is not None
        at_once = max(1, batch_tokens // tokens.ids.shape[1])
        whole = self.source.whole(dtype)
        data = (tokens.ids.to(self.source.device),)
        gradients: dict[str, Tensor] = {}
        if method.needs_gradient and self.keeper.finished < self.layers:
            weights: list[Any] = [whole.get_submodule(m.module).weight for m in targets]
            found = mean_gradients(whole, weights, data, token_loss, samples_at_once=at_once)
            gradients = {m.module: g.T if m.transposed else g for m, g in zip(targets, found, strict=True)}
        for layer in self._blocks("start"):
            members = [m for m in targets if m.layer == layer]
            seen = self._observe(layer, [m.module for m in members], advance=True)[1] if self._observed else {}
            ranked = {}
            for matrix in members:
                target = self._target(matrix.module, "weight", layer, name=matrix.module)
                mine = {**seen.get(matrix.module, {}), "gradient": gradients.get(matrix.module)}
                ranked[matrix.module] = method.score(target, mine).float().cpu()
                check_finite(ranked[matrix.module], matrix.module, layer, "scores")
            self.keeper.keep(layer, Decision(), final=False, walk=self._walk, ranked=ranked)
        rule = method.rule()
        scores = {m.module: self.keeper.ranked(m.module) for m in targets}
        searched = [Searched(m.module, rule.keep(scores[m.module]), scores[m.module], m.transposed) for m in targets]
        descent = MaskDescent(whole, searched, data, token_loss, method.descent(), samples_at_once=at_once)
        del scores, searched
        self._search(descent)
        masks = descent.masks()
        stored = {
            m.tensor: (masks[m.module].T if m.transposed else masks[m.module]).contiguous().cpu() for m in targets
        }
        self.keeper.close(iter([Decision(masks=stored, notes=descent.notes())]))

    def _search(self, descent: MaskDescent) -> None:
        """All steps, from the state that was kept last; states are kept on the way."""
        state, kept = self.keeper.searched(), time.monotonic()
        if state is not None:
            descent.load_state(state)
        while not descent.finished:
            descent.step()
            self.progress("search", len(descent.trace), descent.total)
            if time.monotonic() - kept >= SECONDS_BETWEEN_STATES:
                self.keeper.search(descent.state(), len(descent.trace))
                kept = time.monotonic()

    # -- heads and neurons ---------------------------------------------------------------------------------------

    @decide.register
    def _(self, method: UnitMethod) -> None:
        groups = self.anatomy.of_kind(*method.kinds)
        if not groups:
            raise UnsupportedModelError(unknown_family(self.source.model))
        if all(fraction == 1 for fraction in method.asked.values()):
            return
        total = Limits(budget=method.budget).cost(self.anatomy.blocks)
        # refused before anything is observed
        budgets = self._budgets(method, groups) if method.programmed else None
        for layer in self._blocks("calibrate" if self._observed else "score"):
            members = [g for g in groups if g.layer == layer]
            readers = [g.reader for g in members if g.reader]
            block, seen = self._observe(layer, readers, advance=not method.in_sequence)
            part = Decision(scores=self._scores(method, members, seen))
            if method.in_sequence:
                self._allocate(method, members, part.scores, total // self.layers, part)
                self._revise(method, members, seen, part)
                self._compensate(method, members, seen, part)
                if method.refits:
                    part.notes += self._few_tokens(layer, seen, method)
                    self._refit_groups(members, seen, part, part)
                if block is not None:
                    self._silence(block, members, part)
            self._advance(method, block, layer)
            self.keeper.keep(
                layer, part, final=method.in_sequence, walk=self._walk, seen=None if method.in_sequence else seen
            )
            del block, seen
        if not method.in_sequence:
            self.keeper.close(self._allocate_all(method, groups, total, budgets))

    def _allocate_all(
        self, method: UnitMethod, groups: list[Group], total: int, budgets: Budgets | None
    ) -> Iterator[Decision]:
        part, scores = Decision(), self.keeper.scores()
        if budgets is None:
            self._allocate(method, groups, scores, total, part)
        else:
            self._meet(budgets, method, groups, scores, part)
        revises = type(method).revise is not UnitMethod.revise
        # of what a method has no use for, nothing is read
        for layer in range(self.layers) if method.compensates or revises else ():
            members, seen = [g for g in groups if g.layer == layer], self.keeper.seen(layer)
            self._revise(method, members, seen, part)
            self._compensate(method, members, seen, part)
        yield part

    def _scores(self, method: UnitMethod, groups: list[Group], seen: SeenByModule) -> dict[str, Tensor]:
        found = {}
        for group in groups:
            scores = method.score(self._group_target(group), seen.get(group.reader or "", {}))
            check_finite(scores, group.name, group.layer, "scores")
            found[group.name] = scores.float().cpu()
        return found

    def _allocate(
        self, method: UnitMethod, groups: list[Group], scores: Mapping[str, Tensor], total: int, part: Decision
    ) -> None:
        kept = method.allocator().allocate({g.name: scores[g.name] for g in groups}, groups, total, _limits(method))
        self._keep(groups, kept, part)

    def _keep(self, groups: list[Group], kept: Mapping[str, Tensor], part: Decision) -> None:
        for group in groups:
            part.groups[group.name] = group.units
            part.keep[group.name] = kept[group.name]

    def _revise(self, method: UnitMethod, groups: list[Group], seen: SeenByModule, part: Decision) -> None:
        """Let the method have another look at which units leave, now that their number is known."""
        if type(method).revise is UnitMethod.revise:
            return
        for group in groups:
            gone = _complement(part.keep[group.name], group.units)
            # a swap between parts that must lose the same number each would unbalance them
            if len(gone) and group.balance == 1:
                gone = method.revise(self._group_target(group), seen.get(group.reader or "", {}), gone)
                part.keep[group.name] = _complement(gone.cpu(), group.units)

    def _budgets(self, method: UnitMethod, groups: list[Group]) -> Budgets:
        def found() -> Budgets:
            budgets = Budgets.of(method, self.anatomy, self.source, self.latency_table, self.progress)
            budgets.check(groups, _limits(method))
            return budgets

        return self.ranks.on_main(found)

    def _meet(
        self, budgets: Budgets, method: UnitMethod, groups: list[Group], scores: Mapping[str, Tensor], part: Decision
    ) -> None:
        """Decide by an integer programme over all groups."""
        losses = self._variant_losses(method, groups, scores) if method.variants == "measured" else None
        allocator = budgets.allocator(scores, losses)
        kept = allocator.allocate({g.name: scores[g.name] for g in groups}, groups, 0, _limits(method))
        self._keep(groups, kept, part)
        part.budgets = budgets.account(kept, groups)
        part.notes += budgets.notes

    def _variant_losses(
        self, method: UnitMethod, groups: list[Group], scores: Mapping[str, Tensor]
    ) -> dict[str, dict[int, float]]:
        tokens, dtype, *_ = self._walk_arguments
        assert tokens is not None
        ids = windows_for(tokens.ids, method.variant_tokens)
        variants = {g.name: variants_of(g, scores[g.name], _limits(method)) for g in groups}
        # what is asked of a method changes which variants there are, and not what they lose
        own = {name: value for name, value in method.options().items() if name not in UnitMethod.asking}
        path = variants_file(self.statistics, ids, variants, [method.name, own, str(dtype)])
        losses = read_losses(path)
        if losses is None:
            losses = measure_variants(
                self.source, ids, variants, groups, partial(self._cut_to, method), dtype=dtype, progress=self.progress
            )
            if path is not None:
                write_losses(path, losses)
        return losses

    def _cut_to(self, method: UnitMethod, block: nn.Module, group: Group, units: Tensor) -> None:
        """Leave these units of a group in the working copy of its block, and make up for the others."""
        part = Decision(groups={group.name: group.units}, keep={group.name: units})
        if method.compensates:
            self._compensate(method, [group], self.keeper.seen(group.layer), part)
        self._silence(block, [group], part)

    def _compensate(self, method: UnitMethod, groups: list[Group], seen: SeenByModule, part: Decision) -> None:
        for group in groups:
            gone = _complement(part.keep[group.name], group.units)
            if not len(gone):
                continue
            target, mine = self._group_target(group), seen.get(group.reader or "", {})
            bias = method.compensate(target, mine, gone)
            if bias is None and method.heal == "bias":
                columns = group.columns[gone].flatten()
                bias = BiasHealer().heal(target.weight, find(mine, Moments).mean_C, columns)
            if bias is not None:
                check_finite(bias, group.name, group.layer, "bias compensation")
                part.biases[f"{group.reader}.bias"] = bias.float().cpu()

    def _refit_groups(self, groups: list[Group], seen: SeenByModule, decided: Decided, part: Decision) -> None:
        """Refit the columns that stay of the weights which read groups, and the biases where there are some."""
        for group in groups:
            gone, reader = _complement(decided.keep[group.name], group.units), group.reader or ""
            if not len(gone):
                continue
            target, bias = self._group_target(group), f"{reader}.bias"
            gone_I = torch.zeros(target.weight.shape[1], dtype=torch.bool, device=target.weight.device)
            gone_I[group.columns[gone].flatten().to(gone_I.device)] = True
            weight, added, notes = self._refit.columns(
                group.name, target.weight, gone_I, seen[reader], bias=bias in decided.biases
            )
            part.notes += notes
            self._put(part, reader, weight, ~gone_I.expand(weight.shape), not self._is_linear(reader), group.layer)
            if added is not None:
                check_finite(added, group.name, group.layer, "bias compensation")
                part.biases[bias] = added.float().cpu()

    def _silence(self, block: nn.Module, groups: list[Group], part: Decision) -> None:
        """Make the working copy give what the cut block will give."""
        for group in groups:
            reader = block.get_submodule(self._inside(group.reader or ""))
            gone = _complement(part.keep[group.name], group.units)
            columns, name = group.columns[gone].flatten(), f"{group.reader}.weight"
            weight: Tensor = reader.weight  # type: ignore[assignment]
            with torch.no_grad():
                if name in part.values:
                    values = part.values[name].to(weight.device, weight.dtype)
                    weight.masked_scatter_(part.masks[name].to(weight.device), values)
                weight.index_fill_(1 if isinstance(reader, nn.Linear) else 0, columns.to(weight.device), 0)
                bias = part.biases.get(f"{group.reader}.bias")
                if bias is not None:
                    old = reader.bias.detach() if reader.bias is not None else 0.0  # type: ignore[union-attr]
                    reader.bias = nn.Parameter((bias.to(weight.device) + old).to(weight.dtype))  # type: ignore[assignment]

    # -- refitting what was decided on the dense model ---------------------------------------------------------------

    def refit(self, method: WeightMethod | UnitMethod) -> None:
        """A walk over the cut blocks, which gives new values to what stays of them."""
        decided = self.keeper.decided()
        hidden = self._walk_arguments[3].another()
        self._walk, self._observed = None, method.refit_statistics()
        self._walk_arguments = (*self._walk_arguments[:3], hidden)
        matrices = [m for m in self.anatomy.matrices if m.tensor in decided.masks]
        groups = [g for g in self.anatomy if g.name in decided.keep and g.reader]
        for layer in self._blocks("refit", self.keeper.refitted):
            part = Decision()
            mine = [m for m in matrices if m.layer == layer]
            members = [g for g in groups if g.layer == layer]
            readers = [m.module for m in mine] or [g.reader for g in members if g.reader]
            block, seen = self._observe(layer, readers, advance=False)
            assert block is not None
            part.notes += self._few_tokens(layer, seen, method)
            for matrix in mine:
                weight = self._refit_matrix(matrix, decided, seen[matrix.module], part)
                _write(block, self._inside(matrix.module), weight, matrix.transposed)
            if members and not mine:
                self._refit_groups(members, seen, decided, part)
                known = Decision(keep=dict(decided.keep), masks=part.masks, values=part.values, biases=part.biases)
                self._silence(block, members, known)
            self._go_on(block, layer)
            self.keeper.refit(layer, part, self._walk)
            del block, seen

    def _refit_matrix(self, matrix: Matrix, decided: Decided, seen: Mapping[str, Any], part: Decision) -> Tensor:
        target = self._target(matrix.module, "weight", matrix.layer, name=matrix.module)
        stored = decided.masks[matrix.tensor].to(target.weight.device)
        keep = stored.T if matrix.transposed else stored
        weight, notes = self._refit.weights(target.name, target.weight, keep, seen)
        part.notes += notes
        self._put(part, matrix.module, weight, keep, matrix.transposed, matrix.layer)
        return weight

    def _few_tokens(self, layer: int, seen: SeenByModule, method: WeightMethod | UnitMethod) -> tuple[str, ...]:
        """Said once, for the widest input of the first block."""
        grams = [find(statistics, Gram) for statistics in seen.values()] if layer == 0 else []
        widest = max(grams, key=lambda gram: len(gram.dead), default=None)
        pattern = getattr(method, "pattern", "")
        share = parse_pattern(pattern).share if pattern else method.sparsity
        return few_tokens(widest.tokens, int(len(widest.dead) * (1 - share))) if widest is not None else ()

    # -- whole blocks --------------------------------------------------------------------------------------------

    @decide.register
    def _(self, method: LayerMethod) -> None:
        group = self.anatomy["layers"]
        count = method.layers or int(group.units * method.sparsity)
        if count == 0:
            return
        if group.frozen:
            raise UnsupportedModelError(f"blocks of {type(self.source.model).__name__} must stay: {group.frozen}")
        if count >= group.units:
            raise BudgetError(f"can't remove {count} of {group.units} blocks: at least one must stay")
        for layer in self._blocks("calibrate"):
            name = f"layers.{layer}"
            score = method.score(Target(name, "layer", layer, torch.empty(0, 0)), self._observe_block(layer))
            ranked = {name: torch.tensor([score], dtype=torch.float64)}
            self.keeper.keep(layer, Decision(), final=False, walk=self._walk, ranked=ranked)
        self.keeper.close(self._drop_lowest(group, count))

    def _drop_lowest(self, group: Group, count: int) -> Iterator[Decision]:
        ranked = torch.cat([self.keeper.ranked(f"layers.{layer}") for layer in range(group.units)])
        check_finite(ranked, "layers", 0, "scores")
        yield Decision(
            groups={"layers": group.units},
            keep={"layers": ranked.argsort(stable=True)[count:].sort().values},
            scores={"layers": ranked.float()},
        )

    # -- shared --------------------------------------------------------------------------------------------------

    def _blocks(self, stage: str, finished: int | None = None) -> Iterator[int]:
        """The blocks that are not finished yet, each checked when its turn comes."""
        for layer in range(self.keeper.finished if finished is None else finished, self.layers):
            for name, tensor in self.source.block_tensors(layer).items():
                self.source.check(name, tensor, layer)
            yield layer
            self.progress(stage, layer + 1, self.layers)

    def _observe(self, layer: int, modules: list[str], *, advance: bool) -> tuple[nn.Module | None, SeenByModule]:
        """(working copy of the block, statistics by full module name)."""
        if advance and (seen := self._kept_seen(layer)) is not None:
            return None, seen
        walk = self.walk()
        if walk is None:
            return None, {}
        block = walk.open(layer)
        inside = [self._inside(name) for name in modules]
        found = walk.observe(block, layer, inside, self._observed, advance=advance)
        seen = {full: found[short] for full, short in zip(modules, inside, strict=True)}
        self._complete(layer, seen, dense=advance)
        return block, seen

    def _observe_block(self, layer: int) -> Mapping[str, Any]:
        """Statistics of (input, output) of a block of the dense model."""
        name = f"layers.{layer}"
        seen = self._kept_seen(layer) or {}
        walk = self.walk() if not seen else None
        if walk is not None:
            seen = {name: walk.observe_block(walk.open(layer), layer, self._observed)}
            self._complete(layer, seen, dense=True)
        return seen.get(name, {})

    def _complete(self, layer: int, seen: Mapping[str, dict[str, Any]], *, dense: bool) -> None:
        """Add to the statistics of a block what the other ranks saw; those of the dense model are kept."""
        self.ranks.merge(seen)
        if dense and self.statistics is not None and self.ranks.main:
            self.statistics.mkdir(parents=True, exist_ok=True)
            write_seen(self._statistics_file(layer), seen)

    def _kept_seen(self, layer: int) -> SeenByModule | None:
        """Statistics of the dense model from an earlier run, when those of this block and all later ones are there."""
        if self.statistics is None or self._walk is not None or not self._observed:
            return None
        # rank 0 looks for all: another run may be writing them right now
        if not self.ranks.on_main(lambda: self._kept_from(layer)):
            return None
        return read_seen(self._statistics_file(layer), self._observed, self.source.device_of(layer))

    def _kept_from(self, layer: int) -> bool:
        return all(self._statistics_file(later).is_file() for later in range(layer, self.layers))

    def _statistics_file(self, layer: int) -> Path:
        assert self.statistics is not None
        return self.statistics / f"block-{layer:05d}.safetensors"

    def _advance(self, method: Method, block: nn.Module | None, layer: int) -> None:
        """Let a block that was changed give the inputs of the next one; the last one has none."""
        if method.in_sequence and block is not None:
            self._go_on(block, layer)

    def _go_on(self, block: nn.Module, layer: int) -> None:
        if self._walk is not None and layer + 1 < self.layers:
            self._walk.advance(block, layer)

    def _is_linear(self, module: str) -> bool:
        return isinstance(self.source.model.get_submodule(module), nn.Linear)

    def _inside(self, module: str) -> str:
        """Name of a module within its block."""
        return module.removeprefix(self.source.name + ".").partition(".")[2]

    def _group_target(self, group: Group) -> Target:
        return self._target(group.reader or "", group.kind, group.layer, name=group.name, columns=group.columns)

    def _target(self, module: str, kind: str, layer: int, *, name: str, columns: Tensor | None = None) -> Target:
        linear = self.source.model.get_submodule(module)
        weight = self.source.tensor(f"{module}.weight").to(self.source.device_of(layer))
        weight = weight if isinstance(linear, nn.Linear) else weight.T
        # float64 models are kept as they are: their users want the exact answer
        weight = weight if weight.dtype == torch.float64 else weight.float()
        return Target(name, kind, layer, weight) if columns is None else Target(name, kind, layer, weight, columns)


def _limits(method: UnitMethod) -> Limits:
    return Limits(budget=method.budget, min_keep=method.min_keep, round_to=method.round_to)


def _check_pattern(pattern: str, matrices: list[Matrix]) -> None:
    rule = parse_pattern(pattern)
    for matrix in matrices:
        if matrix.shape[1] % rule.m:
            raise UsageError(
                f"pattern {pattern} needs a multiple of {rule.m} inputs, {matrix.module} has {matrix.shape[1]}"
            )


def _complement(kept: Tensor, units: int) -> Tensor:
    gone = torch.ones(units, dtype=torch.bool)
    gone[kept] = False
    return gone.nonzero().flatten()


def _write(block: nn.Module, name: str, weight: Tensor, transposed: bool) -> None:
    """Put a pruned weight [outputs, inputs] into the working copy of a block."""
    parameter: Tensor = block.get_submodule(name).weight  # type: ignore[assignment]
    with torch.no_grad():
        parameter.copy_(weight.T if transposed else weight)
