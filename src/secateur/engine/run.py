"""What the deciding of every kind of method has in common: the walk over the blocks, and what it looks at."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from secateur.allocators import Allocator, Measuring
from secateur.engine.keeping import Decision, Keeper, SeenByModule
from secateur.errors import DataError, OutputError
from secateur.healing import Refit
from secateur.memory import reuse, trim
from secateur.methods import Method, Target
from secateur.models.decoders import decoder_anatomy, family_of, typed_blocks
from secateur.models.families import summed
from secateur.models.sources import Source, check_finite
from secateur.observe import Ending, Statistic, beside_dense, of_ending
from secateur.observe.activations import Activations
from secateur.observe.calibration import Tokens
from secateur.observe.driver import BlockWalk
from secateur.observe.store import read_seen, write_seen
from secateur.ranks import Ranks
from secateur.structure import Anatomy, Group
from secateur.structure.surgery import complement

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Progress = Callable[[str, int, int], None]


class Run:
    """One decision about the model of ``source``, block by block; see ``secateur.engine.decide``.

    ``walk`` are the hidden states of the calibration windows on their way, None until something is observed, and
    ``observed`` the statistics that are taken of what the blocks read.
    """

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
            asked = getattr(method, "heal", "")
            heals = f" with heal={asked}" if asked and not method.statistics else ""
            raise DataError(f"{method.name}{heals} needs calibration data: give a tokenizer and a calibration text")
        self.method, self.source, self.progress, self.keeper = method, source, progress, keeper
        self.anatomy: Anatomy = decoder_anatomy(source.model, heads=getattr(method, "heads", "kv"))
        self.layers = len(source.blocks)
        self.statistics, self.ranks = statistics, ranks
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.latency_table: Path | None = None
        self.walk: BlockWalk | None = None
        self.allocator: Allocator | None = None
        self.allocator_statistics: Path | None = None
        self.tokens, self.dtype, self.batch_tokens = tokens, dtype, batch_tokens
        self.hidden = Activations() if hidden is None else hidden
        self.observed: Mapping[str, type[Statistic]] = method.observed_statistics()
        self.repair = Refit()

    def begin(self, *, dense: bool) -> BlockWalk | None:
        """The walk over calibration data, begun when it is first needed; None for a method that takes no data.

        ``dense`` says that it leads through the blocks as they are. Raises OutputError when a resumed run can't go on.
        """
        if self.walk is None and self.observed and self.tokens is not None:
            self.walk = BlockWalk(
                self.source,
                self.ranks.part(self.tokens.ids),
                dtype=self.dtype,
                batch_tokens=self.batch_tokens,
                hidden=self.hidden,
                dense=self.hidden.another("dense") if beside_dense(self.observed) else None,
            )
            if not self.keeper.resume(self.walk):
                if not dense:
                    raise lost_states()
                # as long as all statistics come from a folder nothing is walked, and no hidden states are kept
                for layer in range(self.keeper.finished):
                    self.walk.go_past(layer)
        return self.walk

    def blocks(self, stage: str, finished: int | None = None) -> Iterator[int]:
        """The blocks that are not finished yet, each checked when its turn comes."""
        reuse()
        for layer in range(self.keeper.finished if finished is None else finished, self.layers):
            for name, tensor in self.source.block_tensors(layer).items():
                self.source.check(name, tensor, layer)
            yield layer
            trim()
            self.progress(stage, layer + 1, self.layers)

    def observe(
        self, layer: int, modules: list[str], *, advance: bool, begun: nn.Module | None = None
    ) -> tuple[nn.Module | None, SeenByModule]:
        """(working copy of the block, statistics by full module name); the copy is the one that was ``begun`` with."""
        if advance and (seen := self._kept_seen(layer)) is not None:
            return None, seen
        walk = self.begin(dense=advance)
        if walk is None:
            return None, {}
        block = walk.open(layer) if begun is None else begun
        inside = [self.inside(name) for name in modules]
        heads = [g for g in self.anatomy if g.layer == layer and g.reader in modules]
        columns = {self.inside(g.reader or ""): g.columns.reshape(g.units * g.parts, -1) for g in heads}
        found = walk.observe(
            block,
            layer,
            inside,
            self.observed,
            advance=advance,
            columns=columns,
            ending=self.ending(layer),
            begun=begun is not None,
        )
        seen = {full: found[short] for full, short in zip(modules, inside, strict=True)}
        self._complete(layer, seen, dense=advance)
        return block, seen

    def settle_attention(self, block: nn.Module, layer: int) -> None:
        """The attention of a block is decided, so that what it gives is the same in all forwards that are to come."""
        if self.walk is not None:
            self.walk.settle(block, typed_blocks(self.source.model)[layer].family.attention)

    def ending(self, layer: int) -> Ending | None:
        """What a block adds last to its hidden states; None where that isn't asked for, unknown or has left."""
        if not of_ending(self.observed) or family_of(self.source.model) is None:
            return None
        block = typed_blocks(self.source.model)[layer]
        norm, factor = summed(self.source.model.config, block.family)
        return Ending(self.inside(block.down), norm, factor) if block.has_mlp else None

    def observe_block(self, layer: int) -> Mapping[str, Any]:
        """Statistics of (input, output) of a block of the dense model."""
        name = f"layers.{layer}"
        seen = self._kept_seen(layer) or {}
        walk = self.begin(dense=True) if not seen else None
        if walk is not None:
            seen = {name: walk.observe_block(walk.open(layer), layer, self.observed)}
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
        if self.statistics is None or self.walk is not None or not self.observed:
            return None
        # rank 0 looks for all: another run may be writing them right now
        if not self.ranks.on_main(lambda: self._kept_from(layer)):
            return None
        return read_seen(self._statistics_file(layer), self.observed, self.source.device_of(layer))

    def _kept_from(self, layer: int) -> bool:
        return all(self._statistics_file(later).is_file() for later in range(layer, self.layers))

    def _statistics_file(self, layer: int) -> Path:
        assert self.statistics is not None
        return self.statistics / f"block-{layer:05d}.safetensors"

    def advance(self, method: Method, block: nn.Module | None, layer: int) -> None:
        """``go_on`` with a block that was changed, for methods whose later blocks see that."""
        if method.in_sequence and block is not None:
            self.go_on(block, layer)

    def go_on(self, block: nn.Module, layer: int) -> None:
        """Let a block give the inputs of the next one; the last one has none."""
        if self.walk is not None and layer + 1 < self.layers:
            self.walk.advance(block, layer)

    def is_linear(self, module: str) -> bool:
        """Whether the weight is stored as [outputs, inputs]."""
        return isinstance(self.source.model.get_submodule(module), nn.Linear)

    def inside(self, module: str) -> str:
        """Name of a module within its block."""
        return module.removeprefix(self.source.name + ".").partition(".")[2]

    def group_target(self, group: Group) -> Target:
        """The weight that reads the units of a group, with their columns."""
        return self.target(group.reader or "", group.kind, group.layer, name=group.name, columns=group.columns)

    def target(self, module: str, kind: str, layer: int, *, name: str, columns: Tensor | None = None) -> Target:
        """The weight of a module, [outputs, inputs], as methods look at it."""
        linear = self.source.model.get_submodule(module)
        weight = self.source.tensor(f"{module}.weight").to(self.source.device_of(layer))
        weight = weight if isinstance(linear, nn.Linear) else weight.T
        # float64 models are kept as they are: their users want the exact answer
        weight = weight if weight.dtype == torch.float64 else weight.float()
        return Target(name, kind, layer, weight) if columns is None else Target(name, kind, layer, weight, columns)

    def put(self, part: Decision, module: str, weight: Tensor, keep: Tensor, transposed: bool, layer: int) -> None:
        """New values [outputs, inputs] for what ``keep`` keeps of the weight of a module."""
        name, stored = f"{module}.weight", keep.T.contiguous() if transposed else keep
        kept = (weight.T if transposed else weight)[stored].to(self.source.tensor(name).dtype)
        # as they will be: what float32 can hold may be infinite in float16
        check_finite(kept, module, layer, "compensated weights")
        part.masks[name], part.values[name] = stored.cpu(), kept.cpu()

    def silence(self, block: nn.Module, groups: list[Group], part: Decision) -> None:
        """Make the working copy give what the cut block will give."""
        for group in groups:
            reader = block.get_submodule(self.inside(group.reader or ""))
            gone = complement(part.keep[group.name], group.units)
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


def lost_states() -> OutputError:
    """The error of a run whose next block would be observed with the hidden states of another place."""
    return OutputError(
        "the run can't go on: the hidden states behind its last finished block are gone; begin again with --overwrite"
    )


def set_weight(block: nn.Module, name: str, weight: Tensor, transposed: bool) -> None:
    """Put a pruned weight [outputs, inputs] into the working copy of a block."""
    parameter: Tensor = block.get_submodule(name).weight  # type: ignore[assignment]
    with torch.no_grad():
        parameter.copy_(weight.T if transposed else weight)
