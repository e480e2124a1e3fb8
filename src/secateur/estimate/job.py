"""One step of a run as an estimate sees it: a method, the calibration data, and how the work is done."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from secateur.allocators import Measuring
from secateur.estimate.sizes import BlockSizes, Inputs
from secateur.healing.recovery import RecoveryOptions
from secateur.methods import (
    CoupledMethod,
    IterativeMethod,
    LayerMethod,
    Method,
    Refittable,
    SearchMethod,
    StructuredMethod,
    SublayerMethod,
    SupernetMethod,
    TrainedMethod,
    UnitMethod,
    WeightMethod,
)
from secateur.observe import Needs, beside_dense, of_ending
from secateur.observe.statistics import Accumulator
from secateur.solver import cg_flops, refit_columns_flops


def on_processor(device: str) -> bool:
    """Whether what is computed on ``device`` lies in the memory of the process."""
    return torch.device(device).type == "cpu"


@dataclass(frozen=True)
class Job:
    """``samples`` windows of ``length`` tokens in batches of about ``batch_tokens``, in ``dtype``.

    ``activation_memory`` is in bytes; ``format`` is dense or packed; ``recovery`` is the training of what is left. Each
    of the ``ranks`` does its part of that training, and has its part of the windows.
    """

    method: Method
    samples: int
    length: int
    dtype: torch.dtype
    batch_tokens: int = 2048
    activation_memory: int | None = None
    format: str = "dense"
    device: str = "cpu"
    allocation: Measuring | None = None
    recovery: RecoveryOptions | None = None
    ranks: int = 1

    @property
    def observes(self) -> bool:
        """Whether calibration text goes through the model."""
        return self.method.uses_data or self.allocates

    @property
    def allocates(self) -> bool:
        """Whether it goes through the dense model once before, for an allocator."""
        return self.allocation is not None and bool(self.allocation.statistics)

    @property
    def windows(self) -> int:
        """Windows of one of the ranks."""
        return -(-self.samples // self.ranks)

    @property
    def tokens(self) -> int:
        """Calibration tokens that one of the ranks has in all."""
        return self.windows * self.length if self.observes else 0

    @property
    def batch(self) -> int:
        """Tokens that go through a block together."""
        if "diagonal" in self.gradients:
            return self.length
        return min(self.windows, max(1, self.batch_tokens // self.length)) * self.length if self.observes else 0

    @property
    def trial_tokens(self) -> int:
        """Tokens that go through whole models, for an allocator or a method that tries some."""
        if isinstance(self.method, SupernetMethod):
            return self.repeats * self.method.evolution(self.tokens).trial_tokens
        return self.allocation.allocator.trial_tokens if self.allocation is not None else 0

    @property
    def widest_trial(self) -> int:
        """Tokens of all whole models that go through the blocks together, at most."""
        if isinstance(self.method, SupernetMethod):
            return self.method.evolution(self.tokens).widest_trial
        return self.allocation.allocator.widest_trial if self.allocation is not None else 0

    def tried_tokens(self, blocks: int) -> int:
        """Tokens that go through models without some of their sub-layers, for a method that tries them out."""
        return self.method.tried_tokens(2 * blocks, self.tokens) if isinstance(self.method, SublayerMethod) else 0

    @property
    def repairs(self) -> bool:
        """Whether all weights that stay get new values."""
        method = self.method
        weights = isinstance(method, WeightMethod | SearchMethod)
        return weights and (method.descriptor.recovery == "least_squares" or method.refits)

    @property
    def ranks_globally(self) -> bool:
        """Whether all weights of the model compete, so that their scores are kept until the end."""
        return isinstance(self.method, WeightMethod) and self.method.decides_globally

    @property
    def streams(self) -> int:
        """How many hidden states there are of every token: those of the dense model too, where they are the target."""
        return 2 if beside_dense(self._deciding) or beside_dense(self._refitting) else 1

    @property
    def in_stages(self) -> bool:
        """Whether text goes through a block again before every matrix that reads something else."""
        return isinstance(self.method, WeightMethod) and self.method.true_sequential

    @property
    def states(self) -> int:
        """How many times as much as one stream is held: the streams, and what an attention that is settled gave."""
        return self.streams + int(self.in_stages)

    @property
    def passes(self) -> tuple[int, int]:
        """How often text goes through a block, and through the last one, which needn't give inputs to another.

        Passes before later stages of a block aren't among them.
        """
        again = 1 if self.method.in_sequence else 0
        paired = int(beside_dense(self._deciding))
        first = (1 + again + paired, 1 + paired) if self._deciding else (0, 0)
        paired = int(beside_dense(self._refitting))
        later = (2 + paired, 1 + paired) if self._refitting else (0, 0)
        # up, up again with a graph, and back, which is twice that
        back = 4 if self.walks_back else 0
        return back + self.repeats * first[0] + later[0], back + self.repeats * first[1] + later[1]

    @property
    def gradients(self) -> tuple[str, ...]:
        """What a method wants of gradients that come back through the blocks, one by one; empty for others."""
        return self.method.needs if isinstance(self.method, CoupledMethod) else ()

    @property
    def walks_back(self) -> bool:
        """Whether gradients come back through the blocks."""
        return bool(self.gradients)

    @property
    def trains(self) -> bool:
        """Whether the method trains the whole model, and doesn't walk through its blocks."""
        return isinstance(self.method, TrainedMethod)

    @property
    def levels(self) -> int:
        """To how many levels every group is cut for a search; 0 for methods that don't."""
        return self.method.levels if isinstance(self.method, SupernetMethod) else 0

    @property
    def repeats(self) -> int:
        """How often the walk that decides is made: once for every search over levels."""
        return self.method.searches(self.tokens) if isinstance(self.method, SupernetMethod) else 1

    @property
    def searched_tokens(self) -> int:
        """Tokens that one step of a search on the whole model looks at; 0 for methods that don't search."""
        if not isinstance(self.method, SearchMethod):
            return 0
        return min(self.method.descent().batch, self.samples) * self.length

    def search_steps(self, matrices: list[int]) -> int:
        """Steps of that search, for matrices with so many entries; those that share a batch are one."""
        from secateur.search import step_slots

        if not isinstance(self.method, SearchMethod):
            return 0
        descent = self.method.descent()
        steps = len(step_slots(matrices, descent.steps, descent.min_steps)) * descent.epochs
        # a matrix has one step in a batch
        return -(-steps // min(descent.together, len(matrices)))

    @property
    def round_tokens(self) -> int:
        """Tokens on which a method looks at the whole model, forward and back, before it goes on; 0 for others."""
        if not isinstance(self.method, IterativeMethod):
            return 0
        return min(self.method.step_windows or self.samples, self.samples) * self.length

    @property
    def sparsity(self) -> float:
        """The fraction that is asked for."""
        pattern = getattr(self.method, "pattern", "")
        if pattern:
            from secateur.allocate import parse_pattern

            return parse_pattern(pattern).share
        return float(getattr(self.method, "sparsity", 0.0))

    @property
    def variant_tokens(self) -> int:
        """Tokens on which groups with fewer units are measured."""
        method = self.method
        if isinstance(method, UnitMethod) and method.programmed and method.variants == "measured":
            return min(method.variant_tokens, self.samples * self.length)
        return 0

    @property
    def unread(self) -> int:
        """How many of the passes only look at inputs, and so end at the last of them; of stages that of the last."""
        deciding, refitting = (bool(taken) and not of_ending(taken) for taken in (self._deciding, self._refitting))
        return self.repeats * int(deciding and self.method.in_sequence) + int(refitting)

    def targets(self, block: BlockSizes) -> tuple[Inputs, ...]:
        """What the method looks at in a block: all inputs, those of readers, or none."""
        if isinstance(self.method, WeightMethod | SearchMethod):
            return block.inputs
        if isinstance(self.method, StructuredMethod):
            return tuple(inputs for inputs in block.inputs if inputs.reader)
        return ()

    def needs(self, block: BlockSizes, hidden: int) -> Iterator[Needs]:
        """What the statistics of one block take, input by input, in the walk that decides."""
        return self._needs(block, hidden, self._deciding)

    def later_needs(self, block: BlockSizes, hidden: int) -> Iterator[Needs]:
        """The same in the walk that only refits; nothing where there is none."""
        return self._needs(block, hidden, self._refitting)

    def _needs(self, block: BlockSizes, hidden: int, statistics: Mapping[str, type]) -> Iterator[Needs]:
        channels = [inputs.channels for inputs in self.targets(block)]
        if isinstance(self.method, LayerMethod):
            channels = [2 * hidden]
        yield from self._each(channels, list(statistics.values()))

    def allocation_needs(self, block: BlockSizes, hidden: int) -> Iterator[Needs]:
        """What the statistics of an allocator take of one block, before those of the method are there."""
        if self.allocation is not None:
            blocks = self.allocation.allocator.observes == "blocks"
            channels = [2 * hidden] if blocks else [inputs.channels for inputs in block.inputs]
            yield from self._each(channels, list(self.allocation.needed_statistics().values()))

    def _each(self, channels: list[int], statistics: list[type]) -> Iterator[Needs]:
        for width in channels:
            for kind in statistics:
                # a plugin's own class may not say what it takes
                needs = getattr(kind, "needs", Accumulator.needs)
                yield needs(width, tokens=self.tokens, batch=self.batch, length=self.length)

    def solve_flops(self, block: BlockSizes) -> int:
        """Operations by which new weights of a block are found, by the method and by a refit of its masks."""
        method = self.method
        matrices = [matrix for inputs in self.targets(block) for matrix in inputs.matrices]
        found = 0
        if isinstance(method, WeightMethod | StructuredMethod):
            found = sum(method.solve_flops(o, i) for o, i in matrices)
        if method.refits:
            flops = refit_columns_flops if isinstance(method, StructuredMethod) else cg_flops
            found += sum(flops(o, i) for o, i in matrices)
        return found

    @cached_property
    def _deciding(self) -> Mapping[str, type]:
        return self.method.observed_statistics()

    @cached_property
    def _refitting(self) -> Mapping[str, type]:
        method = self.method
        return method.refit_statistics() if isinstance(method, Refittable) and method.refits_later else {}
